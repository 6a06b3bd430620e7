"""Reads folders per split and class (torchvision's ImageFolder): ``train/<class>/*.png``; also Kermany's chest X-rays.

Folder and file names of Kermany et al. 2018: https://data.mendeley.com/datasets/rscbjbr9sj/2 and
https://www.kaggle.com/datasets/paultimothymooney/chest-xray-pneumonia
"""

from __future__ import annotations

import re
from typing import Any

from diffva_ray.data.columns import patient_key
from diffva_ray.data.dataset import Dataset, LabelledImage
from diffva_ray.data.listing import Listing, incomplete
from diffva_ray.data.readers.radiography import COMPANIONS

KIND = "split-folders"
KERMANY = "kermany"
LAYOUT = "train/<class>/*.png (ImageFolder, Kermany)"
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
          "test": "test", "testing": "test"}  # fmt: skip
PNEUMONIA = re.compile(r"(person\d+)_(bacteria|virus)_\d+\.jpe?g$")
NORMAL = re.compile(r"((?:NORMAL2-)?IM-\d{4})(?:-\d{4})*\.jpe?g$")


def read(listing: Listing) -> Dataset | None:
    """The images of all splits, with the split as a column; the set is the folder, or at most two folders below it.

    Copies of the set further down are left out: Kaggle's archive of Kermany's images has one.
    """
    found: dict[str, list[LabelledImage]] = {}  # folder above the splits -> images
    others = 0
    for entry in listing.images:
        *above, split, label, name = ("", "", *entry.path.split("/"))
        top = "/".join(part for part in above if part)
        if split.lower() in SPLITS and label not in (*COMPANIONS, "images", "") and top.count("/") <= 1:
            image = LabelledImage(entry.path, label, entry.size, **details(name, SPLITS[split.lower()]))
            found.setdefault(top, []).append(image)
        elif label not in COMPANIONS:
            others += 1
    if not found:
        return None
    root = min(found, key=lambda top: (top.count("/") + bool(top), top))
    others += sum(len(images) for top, images in found.items() if top != root)
    known = is_kermany(found[root])
    splits = sorted({image.path.removeprefix(f"{root}/").split("/")[0] for image in found[root]})
    why = f"folders {root + '/' if root else ''}{'|'.join(splits)}/<class>; give one of them for one split"
    left_out = [f"{others} images outside these folders"] if others else []
    if not known:
        return Dataset(listing.store, found[root], KIND, why=why, left_out=left_out)
    absent = {"train", "val", "test"} - {image.columns["split"] for image in found[root]}
    remarks = [incomplete(f"{split}/", "its images are left out") for split in sorted(absent)]
    return Dataset(listing.store, found[root], KERMANY, remarks, why=why, left_out=left_out, issuer=KERMANY)


def is_kermany(images: list[LabelledImage]) -> bool:
    """Whether the classes are Kermany's."""
    return {image.label.upper() for image in images} == {"NORMAL", "PNEUMONIA"}


def details(name: str, split: str) -> dict[str, Any]:
    """Patient, split and cause of an image, by Kermany's file names. Its test patients are others and numbered anew."""
    match = PNEUMONIA.match(name) or NORMAL.match(name)
    patient = f"{'test ' if split == 'test' else ''}{match[1]}" if match else ""
    cause = {"cause": match[2]} if match and match.re is PNEUMONIA else {}
    return {"patient": patient_key(patient, KERMANY), "columns": {**({"split": split} if split else {}), **cause}}
