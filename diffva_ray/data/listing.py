"""``Listing``: the files of a data set, listed once, as readers look them up; ``Collection``: what readers collect."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Collection as Names
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from typing import Any

from diffva_ray.config.recipe import DataConfig
from diffva_ray.data.columns import described, patient_key
from diffva_ray.data.dataset import Dataset, LabelledImage, UnusableData, image_files, is_hidden
from diffva_ray.data.images import IMAGE_EXTENSIONS, is_dicom
from diffva_ray.data.shapes import Shape
from diffva_ray.data.tables import Table, read_table
from diffva_ray.progress import one_line
from diffva_ray.storage.store import Entry, Ranges, Store

HEAD_BYTES = 132  # a DICOM file is recognised by these
EXTENSION = re.compile(r"\.[A-Za-z][A-Za-z0-9]{0,9}$")  # DICOM files are also called IM000001 or 1.2.840.113
KNOWN_TABLES = 4  # levels of folders above a table; PhysioNet's wget line makes physionet.org/files/NAME/VERSION


def nfc(text: str) -> str:
    """The text in Unicode's composed form: macOS stores names decomposed, and tables may have the other one."""
    return unicodedata.normalize("NFC", text)


@dataclass
class Listing:
    """The files below a data root.

    Attributes:
        store: Where the files are.
        entries: All files, sorted.
        config: Options of the data set (the recipe's ``data``).
    """

    store: Store
    entries: list[Entry]
    config: DataConfig

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Size in bytes by path."""
        return {entry.path: entry.size for entry in self.entries}

    @cached_property
    def images(self) -> list[Entry]:
        """The image files: by extension, and DICOM files without one by content."""
        candidates = [
            entry
            for entry in self.entries
            if entry.size >= HEAD_BYTES and not EXTENSION.search(entry.path) and not is_hidden(entry.path)
        ]
        if not candidates:
            return image_files(self.entries)
        with ThreadPoolExecutor(16) as pool:
            found = [entry for entry, yes in zip(candidates, pool.map(self._is_dicom, candidates)) if yes]
        return sorted([*image_files(self.entries), *found])

    def _is_dicom(self, entry: Entry) -> bool:
        try:
            return is_dicom(self.store.read_range(entry.path, 0, HEAD_BYTES))
        except OSError:
            return False

    @cached_property
    def _composed(self) -> dict[str, str]:
        return {nfc(path): path for path in self.sizes if not path.isascii()}

    def exact(self, path: str) -> str | None:
        """The listed path that equals ``path``, in either Unicode form; None when there is none."""
        return path if path in self.sizes else self._composed.get(nfc(path))

    @cached_property
    def _tails(self) -> dict[int, dict[str, list[str]]]:
        return {}

    def image(self, name: str, parts: int = 1) -> str | None:
        """Path of the image whose last ``parts`` path components are those of ``name``, apart from the extension.

        None when there is none. Raises UnusableData when there are several: a set beside its resized copy, say.
        """
        if parts not in self._tails:
            index = self._tails[parts] = {}
            for entry in self.images:
                index.setdefault(tail(entry.path, parts), []).append(entry.path)
        found = self._tails[parts].get(tail(name, parts), [])
        if len(found) > 1:
            raise UnusableData(
                f"{self.store.uri}: {name} may be {found[0]} or {found[1]}; give the folder of one copy of the data set"
            )
        return found[0] if found else None

    @cached_property
    def _annotations(self) -> list[str]:
        """Paths of the files at most KNOWN_TABLES folders deep that are no images, the highest first."""
        paths = (
            path
            for path in self.sizes
            if path.count("/") <= KNOWN_TABLES and not path.lower().endswith(IMAGE_EXTENSIONS) and not is_hidden(path)
        )
        return sorted(paths, key=lambda path: (path.count("/"), path))

    def named(self, *patterns: str) -> list[str]:
        """Paths of the tables and other annotations with such a name (``*`` allowed), in the patterns' order.

        They are at most KNOWN_TABLES folders deep; case does not matter. A name is taken once, from the highest folder.
        """
        found: dict[str, str] = {}
        for pattern in patterns:
            for path in self._annotations:
                if fnmatch(base(path).lower(), pattern.lower()):
                    found.setdefault(base(path).lower(), path)
        return list(found.values())

    def table(self, path: str, keep: Names[str] = ()) -> Table:
        """A table of the data set; see ``read_table``."""
        return read_table(self.source(path), path, keep)

    def source(self, path: str) -> bytes | Ranges:
        """Content of a table; a Parquet file, which may hold images, is not fetched whole."""
        whole = not path.lower().endswith(".parquet") or path not in self.sizes
        return self.store.read(path) if whole else Ranges(self.store, path, self.sizes[path])

    def json(self, path: str) -> Any:
        """A JSON file of the data set."""
        try:
            return json.loads(self.store.read(path))
        except ValueError as error:
            raise UnusableData(f"{path}: not JSON ({one_line(error)})") from None

    def require(self, kind: str, files: str, holds: str, looks_like: str = r"(?!)", *, found: bool = False) -> None:
        """Raises UnusableData when there are paths that match the pattern ``looks_like`` (or with ``found``) although
        the ``files`` of the data set ``kind`` are missing, in which one finds what ``holds`` names."""
        pattern = re.compile(looks_like)
        if found or any(pattern.search(entry.path) for entry in self.entries):
            raise UnusableData(
                f"{self.store.uri}: looks like {kind}, but {files} is missing, which holds {holds}; download it, too"
            )


def incomplete(file: str, cost: str) -> str:
    """The remark about a part of a known data set that is not there."""
    return f"incomplete: missing {file}; {cost}"


def base(path: str) -> str:
    """The name of a file."""
    return path.rpartition("/")[2]


def folder(path: str) -> str:
    """The folder of a file, with a slash at its end; "" at the root."""
    return path[: len(path) - len(base(path))]


def top_folders(paths: Iterable[str]) -> str:
    """The highest folders of some paths, at most five; a file at the root stands for itself."""
    tops = sorted({path.split("/")[0] for path in paths})
    return ", ".join(tops if len(tops) <= 5 else [*tops[:4], f"{len(tops) - 4} more"])


def tail(path: str, parts: int) -> str:
    """The last ``parts`` components of a path, composed, without the extension of an image."""
    end = "/".join(nfc(path).replace("\\", "/").split("/")[-parts:])
    stem, dot, extension = end.rpartition(".")
    return stem if dot and f".{extension.lower()}" in IMAGE_EXTENSIONS else end


@dataclass
class Collection:
    """Collects the images of a reader and counts what it leaves out.

    Attributes:
        listing: The files.
        kind: Name of the data set, as in ``Dataset.kind``.
        why: What it was recognised by.
        images: The images.
        shapes: Outlined lesions by image path.
        left_out: Number of files or rows by the reason why they are not taken.
        remarks: Messages for users.
        skipped: Paths of the images that were left out by name.
        issuer: The public data set that numbered the patients; see ``patient_key``.
    """

    listing: Listing
    kind: str
    why: str
    images: list[LabelledImage] = field(default_factory=list)
    shapes: dict[str, list[Shape]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    remarks: list[str] = field(default_factory=list)
    skipped: set[str] = field(default_factory=set)
    issuer: str = ""

    def lacks(self, file: str, cost: str) -> None:
        """Says that the data set is incomplete without ``file``, and what is unknown therefore."""
        self.remarks.append(incomplete(file, cost))

    def skip(self, path: str | None, reason: str) -> None:
        """Leaves out an image that a table names; ``path``: None for an absent file."""
        self.left_out[reason] += 1
        self.skipped |= {path} if path else set()

    def add(self, path: str | None, name: str, labels: Iterable[str], patient: str = "", **columns: str) -> None:
        """Adds an image under its labels. ``path``: None for an absent file, which the table calls ``name``."""
        labels = list(dict.fromkeys(labels))
        if not labels:
            self.skip(path, "images without a positive label")
        size = -1 if path is None else self.listing.sizes[path]
        known: Mapping[str, str] = described(columns)
        key = patient_key(patient, self.issuer)
        self.images += [LabelledImage(path or name, label, size, patient=key, columns=known) for label in labels]

    def outline(self, path: str | None, shape: Shape) -> None:
        """Adds a lesion of the image at ``path``; an absent image has none."""
        if path is not None:
            self.shapes.setdefault(path, []).append(shape)

    def dataset(self) -> Dataset:
        """The data set. Raises UnusableData when none of its images exists.

        A few absent images are kept, and become rows with status ``missing``; when most are absent, the set is unpacked
        in part on purpose, and they are left out.
        """
        listing, files = self.listing, {image.path: image.size for image in self.images}
        absent = sum(size < 0 for size in files.values())
        images = self.images
        if files and absent == len(files):
            raise UnusableData(f"{listing.store.uri}: {self.kind}: none of its {absent} images exists; unpack them")
        if absent > len(files) / 2:
            images = [image for image in images if image.size >= 0]
            self.left_out[f"of {len(files)} images, which are not there (the data set is unpacked in part)"] += absent
        elif absent:
            self.remarks.append(f"{absent} of {len(files)} images do not exist")
        others = [entry.path for entry in listing.images if entry.path not in files and entry.path not in self.skipped]
        if others:
            self.left_out[f"images that no table names ({top_folders(others)})"] += len(others)
        left_out = [f"{count} {what}" for what, count in self.left_out.items() if count]
        return Dataset(
            listing.store, images, self.kind, self.remarks, self.shapes, why=self.why, left_out=left_out,
            issuer=self.issuer,
        )  # fmt: skip
