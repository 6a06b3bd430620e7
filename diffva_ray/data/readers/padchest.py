"""Reads PadChest (Bustos et al. 2020): 16-bit PNG files in folders 0 to 54, and one table; one image per label.

Header line: https://bimcv.cipf.es/bimcv-projects/padchest/
(``PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv``, as torchxrayvision also ships it).
"""

from __future__ import annotations

import ast

from diffva_ray.data.dataset import Dataset
from diffva_ray.data.listing import Collection, Listing, base

KIND = "padchest"
LAYOUT = "PadChest"
FILES = r"(^|/)\d{1,2}/\d{30,}_[0-9a-z\-]+\.png$"
FRONTAL = ("PA", "AP", "AP_horizontal")
KEEP = (
    "ImageID", "StudyDate_DICOM", "PatientID", "PatientBirth", "PatientSex_DICOM", "Projection", "MethodLabel",
    "Labels", "PhotometricInterpretation_DICOM",
)  # fmt: skip


def read(listing: Listing) -> Dataset | None:
    """The frontal images under each of their labels, with patients, views, sex and age."""
    tables = listing.named("PADCHEST_chest_x_ray_images_labels*.csv", "PADCHEST_chest_x_ray_images_labels*.csv.gz")
    if not tables:
        listing.require(LAYOUT, "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv", "labels and patients", FILES)
        return None
    images = Collection(listing, KIND, f"{base(tables[0])} has the columns ImageID and Labels", issuer=KIND)
    inverted = 0
    for _, row in listing.table(tables[0], KEEP).require(tables[0], "ImageID", "Projection", "Labels").rows:
        path = listing.image(row["ImageID"])
        if row["Projection"] not in FRONTAL:
            images.skip(path, "views that are not frontal")
            continue
        inverted += path is not None and row.get("PhotometricInterpretation_DICOM") == "MONOCHROME1"
        images.add(
            path, row["ImageID"], _labels(row["Labels"]), row.get("PatientID", ""), view=row["Projection"],
            sex=row.get("PatientSex_DICOM", ""), age=_age(row.get("StudyDate_DICOM", ""), row.get("PatientBirth", "")),
            label_method=row.get("MethodLabel", ""),
        )  # fmt: skip
    if inverted:
        images.remarks.append(f"{inverted} images come from MONOCHROME1 files; inspect shows whether bone is black")
    return images.dataset()


def _labels(text: str) -> list[str]:
    """The labels of a cell, which is written as a Python list; "exclude" and "unchanged" are no findings."""
    try:
        labels = [str(label).strip() for label in ast.literal_eval(text)] if text else []
    except (ValueError, SyntaxError):
        labels = []
    return [label for label in labels if label not in ("", "exclude", "unchanged")]


def _age(date: str, birth: str) -> str:
    """Age from a date such as 20140915 and a year of birth such as 1930.0."""
    try:
        return str(int(date[:4]) - int(float(birth)))
    except ValueError:
        return ""
