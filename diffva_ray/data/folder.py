"""Reads data sets with one folder per class: ``<class>/*.png``."""

from __future__ import annotations

from diffva_ray.config.recipe import DataConfig
from diffva_ray.data.dataset import Dataset, LabelledImage, UnusableData, image_files
from diffva_ray.data.radiography import COMPANIONS
from diffva_ray.storage.store import Entry, Store

LAYOUT = "<class>/*.png"


def read(store: Store, entries: list[Entry], config: DataConfig) -> Dataset | None:
    """The images of the layout, or None when no folder directly below the root contains images."""
    images = []
    others = 0
    for entry in image_files(entries):
        folder, *rest = entry.path.split("/")
        if len(rest) == 1 and folder not in COMPANIONS:
            images.append(LabelledImage(entry.path, folder, entry.size))
        elif len(rest) != 2 or rest[0] not in COMPANIONS:
            others += 1
    if not images:
        return None
    if {image.label for image in images} == {"images"}:
        raise UnusableData(f"{store.uri}: is one class of a data set; give the folder above it")
    notes = [f"{others} images outside the class folders are ignored"] if others else []
    return Dataset(store, images, "folder", notes)
