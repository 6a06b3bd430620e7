"""Reads NIH ChestX-ray14 (Wang et al., CVPR 2017) as NIH's box and Kaggle ship it: one image per finding.

Header lines: https://nihcc.app.box.com/v/ChestXray-NIHCC (``Data_Entry_2017_v2020.csv``, ``BBox_List_2017.csv``).
"""

from __future__ import annotations

from diffva_ray.data.dataset import Dataset, UnusableData
from diffva_ray.data.listing import Collection, Listing, base
from diffva_ray.data.shapes import Box

KIND = "nih-chestxray14"
LAYOUT = "NIH ChestX-ray14"
TABLES = ("Data_Entry_2017*.csv", "sample_labels.csv")
FILES = r"((^|/)images_0\d\d/(images/)?|^images/)\d{8}_\d{3}\.png$"
NAME, FINDINGS = "Image Index", "Finding Labels"
SEX = ("Patient Gender", "Patient Sex")  # Kaggle's name, NIH's name
BOXES = "BBox_List_2017.csv"
BOX_COLUMNS = (NAME, "Finding Label", "Bbox [x", "y", "w", "h]")
SIDE = 1024  # pixels of the published images; boxes refer to these
AS_IN_TABLE = {"Infiltrate": "Infiltration"}  # a finding that the boxes call otherwise
SPLITS = {"train_val_list.txt": "train", "test_list.txt": "test"}


def read(listing: Listing) -> Dataset | None:
    """The images of the table under each of their findings, with patients, views, the official split and boxes.

    The table's pixel spacing is left out: it is that of the radiograph before it was resized to SIDE."""
    tables = listing.named(*TABLES)
    if not tables:
        listing.require(LAYOUT, "Data_Entry_2017.csv or Data_Entry_2017_v2020.csv", "labels and patients", FILES)
        return None
    keep = (NAME, FINDINGS, "Patient ID", "Patient Age", "View Position", *SEX)
    rows = listing.table(tables[0], keep).require(tables[0], NAME, FINDINGS).rows
    images = Collection(listing, KIND, f"{base(tables[0])} has the columns {NAME} and {FINDINGS}", issuer=KIND)
    split = _split(listing)
    if not split:
        images.lacks(" and ".join(SPLITS), "the official split is unknown")
    for _, row in rows:
        images.add(
            listing.image(row[NAME]), row[NAME], filter(None, row[FINDINGS].split("|")), row.get("Patient ID", ""),
            age=row.get("Patient Age", ""), sex=next((row[name] for name in SEX if name in row), ""),
            view=row.get("View Position", ""), split=split.get(row[NAME], ""),
        )  # fmt: skip
    _add_boxes(images)
    return images.dataset()


def _split(listing: Listing) -> dict[str, str]:
    """The official split by image name, from the lists that the set comes with."""
    return {
        name: SPLITS[base(path).lower()]
        for path in listing.named(*SPLITS)
        for name in listing.store.read(path).decode(errors="replace").split()
    }


def _add_boxes(images: Collection) -> None:
    tables = images.listing.named(BOXES)
    if not tables:
        images.lacks(BOXES, "no lesion is outlined")
    for path in tables:
        for where, row in images.listing.table(path, BOX_COLUMNS).require(path, *BOX_COLUMNS).rows:
            name, label, *numbers = (row[column] for column in BOX_COLUMNS)
            try:
                x, y, w, h = map(float, numbers)
            except ValueError:
                raise UnusableData(f"{where}: {','.join(numbers)} is not x,y,w,h") from None
            box = Box(AS_IN_TABLE.get(label, label), SIDE, SIDE, x, y, w, h)
            images.outline(images.listing.image(name), box)
