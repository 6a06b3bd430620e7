"""Reads Hugging Face image folders: ``metadata.csv``, ``.jsonl`` or ``.parquet`` with ``file_name``, for each split.

Format: https://huggingface.co/docs/datasets/image_dataset#imagefolder
"""

from __future__ import annotations

from diffva_ray.data import manifest
from diffva_ray.data.dataset import Dataset
from diffva_ray.data.listing import Collection, Listing, base, folder
from diffva_ray.data.readers.split_folders import SPLITS

KIND = "image-folder"
LAYOUT = "metadata.csv or metadata.jsonl with file_name (Hugging Face)"
NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def read(listing: Listing) -> Dataset | None:
    """The images of all metadata files; the label is a column, or else the folder of the image."""
    found = {}
    for path in sorted(path for path in listing.sizes if base(path) in NAMES and path.count("/") <= 2):
        table = listing.table(path)
        if "file_name" in table.columns:
            found[path] = table
    if not found:
        return None
    images = Collection(listing, KIND, f"{', '.join(found)} with the column file_name")
    for path, table in found.items():
        top = folder(path)
        split = SPLITS.get(top.rstrip("/").rpartition("/")[2].lower(), "")
        manifest.add_rows(images, table, path, top, {"split": split} if split else {})
    return images.dataset()
