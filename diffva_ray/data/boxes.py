"""Boxes that a reader drew around findings: a CSV with ``file,x,y,w,h``, in pixels of the image."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from diffva_ray.data.dataset import LabelledImage, UnusableData
from diffva_ray.data.manifest import read_table

Box = tuple[float, float, float, float]
COLUMNS = ("file", "x", "y", "w", "h")
Said = TypeVar("Said")  # what a row says of its image: a box, a score, a name


def read_boxes(data: bytes, images: Iterable[LabelledImage], name: str = "boxes.csv") -> dict[str, list[Box]]:
    """Boxes (x, y of the upper left corner, width, height) by image path, for those of ``images`` that have any.

    A row belongs to the image whose path ends with its ``file``, or with whose path its ``file`` ends: the two may be
    relative to different folders. Raises UnusableData, naming the row, for what is no box and for a ``file`` that
    fits several images. Rows that fit none are left out.
    """
    return match(parse(data, name), [image.path for image in images])


def parse(data: bytes, name: str) -> list[tuple[str, str, Box]]:
    """Place ("boxes.csv row 2"), ``file`` and box of every row; rows without numbers (no finding) are left out."""
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
            raise UnusableData(f"{where}: {','.join(texts)} is not a box; w and h are above 0")
        boxes.append((where, file_of(row), (x, y, w, h)))
    return boxes


def file_of(row: Mapping[str, str]) -> str:
    """The ``file`` of a row, written as paths of images are."""
    return row["file"].replace("\\", "/").removeprefix("./")


def match(rows: Sequence[tuple[str, str, Said]], paths: Iterable[str]) -> dict[str, list[Said]]:
    """What rows (place, ``file``, what is said) say, by the path that each belongs to, as in ``read_boxes``. Raises
    UnusableData, naming the row, for a ``file`` that fits several images."""
    known = set(paths)
    files = {file for _, file, _ in rows}
    ending: dict[str, list[str]] = {}  # file -> paths that end with it
    for path in sorted(known):
        for end in ends(path):
            if end in files:
                ending.setdefault(end, []).append(path)
    found: dict[str, list[Said]] = {}
    for where, file, said in rows:
        if file in known:
            fits = [file]
        else:
            fits = ending.get(file) or [end for end in ends(file) if end in known][:1]
        if len(fits) > 1:
            raise UnusableData(f"{where}: {file!r} fits {len(fits)} images; write more of its path")
        for path in fits:
            found.setdefault(path, []).append(said)
    return found


def ends(path: str) -> list[str]:
    """The path and its tails, longest first: a/b/c, b/c, c."""
    parts = path.split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]
