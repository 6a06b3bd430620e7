"""Reads SIIM-ACR Pneumothorax Segmentation 2019: DICOM files and run-length encoded masks.

Header lines: https://www.kaggle.com/c/siim-acr-pneumothorax-segmentation/data; the masks' code is that page's
``mask_functions.py``: down the columns, each start counted from the end of the run before.
"""

from __future__ import annotations

from diffva_ray.data.dataset import Dataset, UnusableData
from diffva_ray.data.listing import Collection, Listing, base
from diffva_ray.data.shapes import Runs

KIND = "siim-acr-pneumothorax"
LAYOUT = "SIIM-ACR Pneumothorax"
FILES = r"(^|/)dicom-images-(train|test)/"
NAME, MASK = "ImageId", "EncodedPixels"
LESION, OTHER = "Pneumothorax", "No Pneumothorax"
SIDE = 1024  # pixels of the published images


def read(listing: Listing) -> Dataset | None:
    """The images of the table: ``Pneumothorax`` with masks, or ``No Pneumothorax``, which need not be healthy."""
    tables = listing.named("train-rle.csv", "stage_2_train.csv", "train-rle-sample.csv")
    tables = [path for path in tables if {NAME, MASK} <= set(listing.table(path).columns)]
    if not tables:
        listing.require(LAYOUT, "train-rle.csv (or stage_2_train.csv)", "labels and masks", FILES)
        return None
    images = Collection(listing, KIND, f"{base(tables[0])} has the columns {NAME} and {MASK}")
    classes: dict[str, str] = {}
    for where, row in listing.table(tables[0]).rows:
        name, text = row[NAME].strip(), row[MASK].strip()
        classes.setdefault(name, OTHER)
        if text not in ("-1", ""):
            classes[name] = LESION
            images.outline(listing.image(name), Runs(LESION, SIDE, SIDE, _counts(text, where)))
    for name, label in classes.items():
        images.add(listing.image(name), name, [label], split="train")
    images.remarks.append(f"{OTHER!r} is not healthy: such images may show other findings")
    return images.dataset()


def _counts(text: str, where: str) -> tuple[int, ...]:
    try:
        counts = tuple(map(int, text.split()))
    except ValueError:
        counts = (-1,)
    if len(counts) % 2 or min(counts) < 0 or sum(counts) > SIDE**2:
        raise UnusableData(f"{where}: {MASK} is not a list of starts and lengths in {SIDE} x {SIDE} pixels")
    return counts
