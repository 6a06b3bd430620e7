"""Reads Parquet files that contain the images themselves, as Hugging Face stores data sets: one file or more per split.

Columns of images and names of classes (``ClassLabel`` in the file's metadata):
https://huggingface.co/docs/datasets/image_dataset and https://huggingface.co/docs/datasets/about_dataset_features
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace

from diffva_ray.data import manifest
from diffva_ray.data.dataset import Dataset, UnusableData
from diffva_ray.data.listing import Collection, Listing, base
from diffva_ray.data.readers.split_folders import SPLITS
from diffva_ray.data.tables import Line, Table

KIND = "parquet-images"
LAYOUT = "Parquet files with a column of images (Hugging Face)"
MEMBER = re.compile(r"(.+\.parquet)/([^/]+)/(\d{6,})\.[a-z]+", re.IGNORECASE)
IMAGE_COLUMNS = (*manifest.ROLES["image"], "image_bytes", "bytes")


def read(listing: Listing) -> Dataset | None:
    """The images of all Parquet files, with the other columns of their rows."""
    files: dict[str, dict[str, dict[int, str]]] = defaultdict(lambda: defaultdict(dict))  # file, column, row -> path
    for entry in listing.entries:
        if match := MEMBER.fullmatch(entry.path):
            files[match[1]][match[2]][int(match[3])] = entry.path
    if not files:
        return None
    # the column of the images, and those of masks
    columns = sorted({column for found in files.values() for column in found})
    image = _image_column(listing, columns)
    listing = replace(listing, config=listing.config.model_copy(
        update={"columns": {"image": image, **listing.config.columns}}))  # fmt: skip
    name = next(iter(files)) if len(files) == 1 else f"{len(files)} Parquet files"
    table = _joined(listing, files)
    roles = manifest.columns_by_role(table, listing.config, name)
    if "label" not in roles:
        others = [column for column in table.columns if column not in columns]
        raise UnusableData(
            f"{listing.store.uri}: no column of {name} is called label; name it with --columns label=NAME (there are "
            f"{', '.join(others)})"
        )
    # the images, without the columns of images that have no role
    used = {column for column in columns if column in roles.values()}
    images = Collection(listing, KIND, f"{name} with images in the column {image}")
    images.skipped |= {path for found in files.values() for column in found for path in found[column].values()
                       if column != image}  # fmt: skip
    unused = [column for column in columns if column not in used]
    if unused:
        images.left_out[f"further columns of images ({', '.join(unused)})"] += len(unused)
    manifest.add_rows(images, table._replace(columns=[c for c in table.columns if c not in unused]), name)
    return images.dataset()


def _image_column(listing: Listing, columns: list[str]) -> str:
    """The column of the images: the option's, else the one with a usual name, else the first."""
    known = {column.casefold(): column for column in columns}
    usual = next((known[name] for name in IMAGE_COLUMNS if name in known), columns[0])
    named = listing.config.columns.get("image", usual)
    if named not in columns:
        raise UnusableData(f"the column {named} (data.columns) has no images; these have: {', '.join(columns)}")
    return named


def _joined(listing: Listing, files: dict[str, dict[str, dict[int, str]]]) -> Table:
    """The tables of the files as one; a cell of an image is its path. The split is in the file's name."""
    columns, rows, unread = [], [], []
    for path, images in files.items():
        table = listing.table(path)
        split = SPLITS.get(re.split(r"[-_.]", base(path).lower())[0], "")
        more = {"split": split} if split and "split" not in table.columns else {}
        columns += [*table.columns, *images, *more]
        unread += [column for column in table.unread if column not in images]
        for number, (where, cells) in enumerate(table.rows):
            members = {column: paths.get(number, "") for column, paths in images.items()}
            rows.append(Line(where, {**cells, **members, **more}))
    names = list(dict.fromkeys(columns))
    return Table(names, [Line(where, {name: cells.get(name, "") for name in names}) for where, cells in rows],
                 list(dict.fromkeys(unread)))  # fmt: skip
