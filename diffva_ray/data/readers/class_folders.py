"""Reads data sets with one folder per class: ``<class>/*.png``."""

from __future__ import annotations

from dataclasses import replace

from diffva_ray.data.dataset import Dataset, LabelledImage, UnusableData
from diffva_ray.data.listing import Listing, base
from diffva_ray.data.readers import split_folders
from diffva_ray.data.readers.radiography import COMPANIONS

KIND = "folder"
LAYOUT = "<class>/*.png"


def read(listing: Listing) -> Dataset | None:
    """The images of the layout, or None when no folder directly below the root contains images."""
    images = []
    others = 0
    for entry in listing.images:
        folder, *rest = entry.path.split("/")
        if len(rest) == 1 and folder not in COMPANIONS:
            images.append(LabelledImage(entry.path, folder, entry.size))
        elif len(rest) != 2 or rest[0] not in COMPANIONS:
            others += 1
    if not images:
        return None
    if {image.label for image in images} == {"images"}:
        raise UnusableData(f"{listing.store.uri}: is one class of a data set; give the folder above it")
    left_out = [f"{others} images outside the class folders"] if others else []
    why = "folders <class> with images"
    if not split_folders.is_kermany(images):
        return Dataset(listing.store, images, KIND, why=why, left_out=left_out)
    # one split of Kermany's images: patients by the names of files
    split = split_folders.SPLITS.get(base(listing.store.uri.rstrip("/")).lower(), "")
    images = [replace(image, **split_folders.details(base(image.path), split)) for image in images]
    return Dataset(listing.store, images, KIND, why=why, left_out=left_out, issuer=split_folders.KERMANY)
