"""Reads ChestX-Det (Lian et al. 2021): images of NIH ChestX-ray14 with boxes and polygons of 13 findings.

Keys of the files: https://github.com/Deepwise-AILab/ChestX-Det-Dataset
"""

from __future__ import annotations

from diffva_ray.data.dataset import Dataset, UnusableData
from diffva_ray.data.listing import Collection, Listing, base
from diffva_ray.data.shapes import Polygon

KIND = "chestx-det"
LAYOUT = "ChestX-Det"
FILES = r"(^|/)(train|test)(_data)?/\d{5}\.png$"
TABLES = {"train": "ChestX_Det_train.json", "test": "ChestX_Det_test.json"}
HEALTHY = "No Finding"  # an image without any finding


def read(listing: Listing) -> Dataset | None:
    """The images of the JSON files under each of their findings, outlined by polygons; ``No Finding`` without one."""
    files = listing.named(*TABLES.values())
    if not files:
        listing.require(LAYOUT, " or ".join(TABLES.values()), "labels and polygons", FILES)
        return None
    images = Collection(listing, KIND, f"{' and '.join(map(base, files))}: file_name, syms, boxes, polygons")
    there = {base(path).lower() for path in files}
    for split, table in TABLES.items():
        if table.lower() not in there and any(f"{split}/" in f"/{entry.path}" for entry in listing.images):
            images.lacks(table, f"the images of {split} have no labels")
    for path in files:
        split = "test" if "test" in base(path) else "train"
        try:
            for item in listing.json(path):
                name, labels = item["file_name"], item["syms"]
                found = listing.image(f"{split}/{name}", 2) or listing.image(name)
                images.add(found, name, labels or [HEALTHY], split=split)
                for label, points in zip(labels, item["polygons"], strict=True):
                    images.outline(found, Polygon(label, points=tuple((float(x), float(y)) for x, y in points)))
        except (KeyError, TypeError, ValueError) as error:
            raise UnusableData(f"{path}: needs a list with file_name, syms and polygons ({error})") from None
    return images.dataset()
