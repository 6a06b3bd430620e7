"""Reads manifests: CSV or Parquet tables with the columns ``path,label[,mask][,caption]``."""

from __future__ import annotations

import csv
import re
from io import BytesIO, StringIO
from pathlib import PurePosixPath
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from diffva_ray.config.recipe import DataConfig
from diffva_ray.data.dataset import Dataset, LabelledImage, UnusableData
from diffva_ray.progress import one_line
from diffva_ray.storage.store import Entry, Store

LAYOUT = "a .csv or .parquet file with path,label"
EXTENSIONS = (".csv", ".parquet")


class Line(NamedTuple):
    """A row of a table."""

    where: str  # position for messages: "images.csv row 2"; the header is row 1
    cells: dict[str, str]  # by column


class Table(NamedTuple):
    """A table whose cells are text."""

    columns: list[str]  # names, in the order of the file
    rows: list[Line]  # without empty lines


def read(store: Store, entries: list[Entry], config: DataConfig, name: str) -> Dataset | None:
    """The images of the manifest ``name``, with paths relative to the store; None when the table has other columns.

    An image whose file is absent is kept with size -1; the path of an absent mask is dropped; notes report both.
    Raises UnusableData, naming the row, for paths outside the folder and for an empty path or label.
    """
    table = read_table(store.read(name), name)
    if not {"path", "label"} <= set(table.columns):
        return None
    sizes = {entry.path: entry.size for entry in entries}
    # one image per row
    images = []
    absent_masks = 0
    for where, row in table.rows:
        label = row["label"].strip()
        if not label:
            raise UnusableData(f"{where}: the label is empty")
        path = inside(row["path"], sizes, where)
        mask = inside(row["mask"], sizes, where) if row.get("mask", "").strip() else ""
        absent_masks += bool(mask) and mask not in sizes
        caption = " ".join(row.get("caption", "").split())
        images.append(LabelledImage(path, label, sizes.get(path, -1), mask if mask in sizes else "", caption=caption))
    # notes about absent files
    absent = ((sum(image.size < 0 for image in images), "images"), (absent_masks, "masks"))
    notes = [f"{count} {what} named in {name} do not exist" for count, what in absent if count]
    return Dataset(store, images, "phantoms" if "phantoms.json" in sizes else "manifest", notes)


def inside(text: str, sizes: dict[str, int], where: str) -> str:
    """Path from a table, normalised. Raises UnusableData when the path is empty or outside the data set's folder."""
    if text not in sizes:
        text = text.strip().replace("\\", "/")  # a table written on Windows
    pure = PurePosixPath(text)
    if not pure.parts:
        raise UnusableData(f"{where}: the path is empty")
    if pure.is_absolute() or ".." in pure.parts or "\0" in text or re.match(r"[A-Za-z]:/|\w+://", text):
        raise UnusableData(f"{where}: {text!r} is outside the folder; paths are relative to the table")
    return str(pure)


def read_table(data: bytes, name: str) -> Table:
    """Reads a CSV (UTF-8) or Parquet file; empty cells are "". Raises UnusableData when the bytes are no such table."""
    columns, lines = (_parquet if name.lower().endswith(".parquet") else _csv)(data, name)
    rows = []
    for number, line in enumerate(lines, start=2):
        if line:
            if len(line) != len(columns):
                raise UnusableData(f"{name} row {number}: {len(line)} cells under {len(columns)} columns")
            rows.append(Line(f"{name} row {number}", dict(zip(columns, line))))
    return Table(columns, rows)


def _csv(data: bytes, name: str) -> tuple[list[str], list[list[str]]]:
    try:
        lines = list(csv.reader(StringIO(data.decode("utf-8-sig"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UnusableData(f"{name}: not a CSV table in UTF-8 ({one_line(error)})") from None
    if not lines:
        raise UnusableData(f"{name}: the table is empty")
    return [column.strip() for column in lines[0]], lines[1:]


def _parquet(data: bytes, name: str) -> tuple[list[str], list[list[str]]]:
    try:
        table = pq.read_table(BytesIO(data))
        cells = [column.cast(pa.string()).to_pylist() for column in table.columns]
    except (pa.ArrowException, OSError) as error:
        raise UnusableData(f"{name}: not a readable Parquet table ({one_line(error)})") from None
    return table.column_names, [[cell or "" for cell in line] for line in zip(*cells)]
