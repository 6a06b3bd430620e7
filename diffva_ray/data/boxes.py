"""Lesion boxes from a CSV with the columns ``file,x,y,w,h``, in pixels of the image."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from diffva_ray.data.dataset import LabelledImage, UnusableData
from diffva_ray.data.shapes import Box
from diffva_ray.data.tables import read_table

COLUMNS = ("file", "x", "y", "w", "h")
Value = TypeVar("Value")  # the content of a row: a box, a score, a name


def read_boxes(data: bytes, images: Iterable[LabelledImage], name: str = "boxes.csv") -> dict[str, list[Box]]:
    """Boxes (x and y of the upper left corner, width, height) by image path; images without boxes are left out.

    A row belongs to the image whose path ends with the row's ``file``, or the other way round: the two may be
    relative to different folders. Rows that match no image are left out. Raises UnusableData, naming the row, for
    an invalid box and for a ``file`` that matches several images.
    """
    return match(parse(data, name), [image.path for image in images])


def parse(data: bytes, name: str) -> list[tuple[str, str, Box]]:
    """Position ("boxes.csv row 2"), ``file`` and box of every row; rows without numbers (no finding) are left out."""
    table = read_table(data, name)
    if not set(COLUMNS) <= set(table.columns):
        raise UnusableData(f"{name}: needs the columns {','.join(COLUMNS)}; it has {','.join(table.columns)}")
    boxes = []
    for where, row in table.rows:
        texts = [row[column].strip() for column in COLUMNS[1:]]
        if not any(texts):
            continue
        try:
            x, y, w, h = (float(text) for text in texts)
        except ValueError:
            raise UnusableData(f"{where}: {','.join(texts)} is not x,y,w,h") from None
        if not all(map(math.isfinite, (x, y, w, h))) or w <= 0 or h <= 0:
            raise UnusableData(f"{where}: {','.join(texts)} is not a box; w and h must be above 0")
        boxes.append((where, file_of(row), Box(x=x, y=y, w=w, h=h)))
    return boxes


def file_of(row: Mapping[str, str]) -> str:
    """The ``file`` of a row, normalised like image paths."""
    return row["file"].replace("\\", "/").removeprefix("./")


def match(rows: Sequence[tuple[str, str, Value]], paths: Iterable[str]) -> dict[str, list[Value]]:
    """Values of the rows (position, ``file``, value), grouped by image path with the rule of ``read_boxes``.

    Raises UnusableData, naming the row, for a ``file`` that matches several images.
    """
    # index the images by the tails of their paths that occur as a file
    images = set(paths)
    files = {file for _, file, _ in rows}
    by_tail: dict[str, list[str]] = {}
    for path in sorted(images):
        for end in ends(path):
            if end in files:
                by_tail.setdefault(end, []).append(path)
    # assign each row to its image: same path, path that ends with the file, or tail of the file
    values: dict[str, list[Value]] = {}
    for where, file, value in rows:
        if file in images:
            matches = [file]
        else:
            matches = by_tail.get(file) or [end for end in ends(file) if end in images][:1]
        if len(matches) > 1:
            raise UnusableData(f"{where}: {file!r} matches {len(matches)} images; write more of its path")
        for path in matches:
            values.setdefault(path, []).append(value)
    return values


def ends(path: str) -> list[str]:
    """The path and its tails, longest first: a/b/c, b/c, c."""
    parts = path.split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]
