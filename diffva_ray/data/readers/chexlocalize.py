"""Reads CheXlocalize (Saporta et al. 2022): CheXpert's validation and test images with radiologists' masks.

File names and keys: https://github.com/rajpurkarlab/cheXlocalize (README and ``sample/``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffva_ray.data.dataset import Dataset, UnusableData
from diffva_ray.data.listing import Listing, base, incomplete
from diffva_ray.data.readers import chexpert
from diffva_ray.data.shapes import Runs, Shape, coco_counts

KIND = "chexlocalize"
LAYOUT = "CheXlocalize"
MASKS = {"val": "gt_segmentations_val.json", "test": "gt_segmentations_test.json"}
LABELS = ("val_labels.csv", "test_labels.csv")  # as the set is shipped
OF_CHEXPERT = ("train.csv", "valid.csv", "val.csv", "test.csv")
OTHER_NAMES = {"Airspace Opacity": "Lung Opacity"}  # of the validation masks


def read(listing: Listing) -> Dataset | None:
    """CheXpert's images, with the mask of each finding; a finding of the tables without a mask has none."""
    masks = listing.named(*MASKS.values())
    if not masks and not (listing.named(*LABELS) and not listing.named(*OF_CHEXPERT)):
        return None
    if not listing.named(*LABELS, *OF_CHEXPERT):
        listing.require(LAYOUT, " or ".join(LABELS), "CheXpert's labels of the images", found=True)
    dataset = chexpert.read(listing)
    if dataset is None:
        return None
    # say which masks are missing
    there = {base(path) for path in masks}
    splits = {image.columns.get("split", "") for image in dataset.images}
    remarks = [incomplete(name, f"no lesion of the {split} images is outlined")
               for split, name in MASKS.items() if split in splits and name not in there]  # fmt: skip
    # outline the lesions
    shapes: dict[str, list[Shape]] = {}
    for path in masks:
        for name, findings in listing.json(path).items():
            image = listing.image("/".join(name.split("_", 2)), 3)  # patient64541_study1_view1_frontal
            for finding, mask in findings.items() if image else ():
                if shape := _runs(OTHER_NAMES.get(finding, finding), mask, f"{path}: {name}: {finding}"):
                    shapes.setdefault(str(image), []).append(shape)
    why = "; ".join(filter(None, (" and ".join(map(base, masks)), dataset.why)))
    return replace(dataset, kind=KIND, why=why, shapes=shapes, remarks=[*dataset.remarks, *remarks])


def _runs(label: str, mask: Any, where: str) -> Runs | None:
    """A mask of COCO's format; None when it is empty."""
    try:
        height, width = mask["size"]
        counts = coco_counts(str(mask["counts"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UnusableData(f"{where}: not a mask with size and counts ({error})") from None
    return Runs(label, width, height, counts) if sum(counts[1::2]) else None
