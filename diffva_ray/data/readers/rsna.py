"""Reads the RSNA Pneumonia Detection Challenge 2018 (Shih et al. 2019): DICOM files, boxes and three classes.

Header lines: https://www.kaggle.com/c/rsna-pneumonia-detection-challenge/data
"""

from __future__ import annotations

from diffva_ray.data.dataset import Dataset, UnusableData
from diffva_ray.data.listing import Collection, Listing, base
from diffva_ray.data.shapes import Box

KIND = "rsna-pneumonia"
LAYOUT = "RSNA Pneumonia 2018"
FILES = r"(^|/)stage_[12]_(train|test)_images/[^/]+\.(dcm|png|jpg)$"
BOX = ("x", "y", "width", "height")
LESION, OTHER = "Lung Opacity", "No Lung Opacity / Not Normal"
SIDE = 1024  # pixels of the published images; boxes refer to these


def read(listing: Listing) -> Dataset | None:
    """The images of the tables under their class, with boxes; the images of the test folder have no labels.

    Without the class table, images without a box are ``No Lung Opacity / Not Normal``, as they need not be healthy.
    """
    tables = listing.named("stage_2_train_labels.csv", "stage_1_train_labels.csv")
    if not tables:
        listing.require(LAYOUT, "stage_2_train_labels.csv", "labels and boxes", FILES)
        return None
    images = Collection(listing, KIND, f"{base(tables[0])} has the columns patientId,{','.join(BOX)},Target")
    # boxes, and a class for every image
    classes: dict[str, str] = {}
    columns = ("patientId", *BOX, "Target")
    for where, row in listing.table(tables[0], columns).require(tables[0], *columns).rows:
        name = row["patientId"]
        classes[name] = LESION if row["Target"] in ("1", "1.0") else OTHER
        if classes[name] == LESION:
            try:
                x, y, w, h = (float(row[column]) for column in BOX)
            except ValueError:
                raise UnusableData(f"{where}: a row with Target 1 needs {','.join(BOX)}") from None
            images.outline(listing.image(name), Box(LESION, SIDE, SIDE, x, y, w, h))
    # the finer classes, which say which images are healthy
    details = listing.named("stage_2_detailed_class_info.csv", "stage_1_detailed_class_info.csv")
    for path in details[:1]:
        for _, row in listing.table(path).require(path, "patientId", "class").rows:
            classes[row["patientId"]] = row["class"]
    if not details:
        images.lacks("stage_2_detailed_class_info.csv", "no image is known to be healthy")
    for name, label in classes.items():
        images.add(listing.image(name), name, [label], name, split="train")
    return images.dataset()
