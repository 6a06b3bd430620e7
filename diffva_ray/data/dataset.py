"""``LabelledImage`` and ``Dataset``: the types that every data set reader returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from diffva_ray.data.images import IMAGE_EXTENSIONS
from diffva_ray.data.shapes import Shape
from diffva_ray.storage.store import Entry, Store

NO_COLUMNS: dict[str, str] = {}  # shared by millions of images


@dataclass(frozen=True)
class LabelledImage:
    """One image under one label. Paths are relative to the data root; empty when there is no such file.

    Attributes:
        path: Path of the image.
        label: Class of the image.
        size: File size in bytes; -1 when the file is absent.
        lung_mask: Path of the lung mask.
        lesion_mask: Path of the lesion mask.
        ground_truth: Path of the ground-truth counterfactual (phantoms only).
        caption: Training prompt of this image; empty: the prompt of its class.
        patient: Hash of the patient's id (``columns.patient_key``); empty when the data set does not know the patient.
        columns: Further columns of the data set's table as text: ``view``, ``laterality``, ``age``, ``sex``,
            ``spacing``, ``split`` where it has them, and any others under their own names; ``condition.NAME`` are paths
            of condition images.
        mirrored: Whether its mirror image is meant (``train.mirror``), and not the image in the file.
    """

    path: str
    label: str
    size: int = -1
    lung_mask: str = ""
    lesion_mask: str = ""
    ground_truth: str = ""
    caption: str = ""
    patient: str = ""
    columns: Mapping[str, str] = field(default_factory=lambda: NO_COLUMNS, hash=False)
    mirrored: bool = False


@dataclass(frozen=True)
class Dataset:
    """Images in a fixed order (by path, then label).

    Attributes:
        store: Where the files are.
        images: The images; a file with two labels occurs twice.
        kind: The layout, such as ``radiography`` or ``manifest``.
        remarks: Messages of the reader for users, one line each.
        shapes: Lesions that the data set outlines (boxes, polygons, masks), by image path.
        bits: Number of bits that the values in 16-bit grey files use (``data.bits``).
        why: What the layout was recognised by.
        left_out: What the reader did not take, with counts, one line each.
        issuer: The public data set that numbered the patients; empty for ids of a user's own.
    """

    store: Store
    images: list[LabelledImage]
    kind: str
    remarks: list[str] = field(default_factory=list)
    shapes: dict[str, list[Shape]] = field(default_factory=dict)
    bits: int = 16
    why: str = ""
    left_out: list[str] = field(default_factory=list)
    issuer: str = ""

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[LabelledImage]:
        return iter(self.images)

    def __repr__(self) -> str:
        classes = ", ".join(f"{label} {count}" for label, count in self.classes.items())
        return f"data set {self.store.uri} ({self.kind}): {len(self)} images; classes {classes}"

    @property
    def notes(self) -> list[str]:
        """All messages for users: what was left out, and remarks."""
        return [*(f"left out: {text}" for text in self.left_out), *self.remarks]

    @property
    def classes(self) -> dict[str, int]:
        """Number of images by class, in alphabetical order."""
        return dict(sorted(Counter(image.label for image in self.images).items()))

    def lesion_shapes(self, path: str, label: str) -> list[Shape]:
        """The outlined lesions of the image at ``path`` under ``label``: those of the label, and those of no label."""
        return [shape for shape in self.shapes.get(path, ()) if shape.label in ("", label)]

    def sample_paths(self, count: int) -> list[str]:
        """At most ``count`` distinct paths of images that were listed, spread evenly over the data set."""
        paths = list(dict.fromkeys(image.path for image in self.images if image.size >= 0))
        return paths[:: max(1, -(-len(paths) // count))]


class UnusableData(ValueError):
    """A data set that cannot be used; the message is one line that names the data set and what is expected."""


def companions(path: str, kind: str) -> tuple[str, ...]:
    """Candidate paths of the mask or ground-truth counterfactual of the image at ``path``, most likely first.

    The candidates have the image's name and are in a folder ``kind`` (``masks``, ``lesions``, ``ground_truth``) beside
    ``images/``, or in the image's own folder when that is not called ``images``.
    """
    name = path.rpartition("/")[2]
    folder = path[: len(path) - len(name)]
    above = folder.removesuffix("images/") if f"/{folder}".endswith("/images/") else folder
    stem, dot, extension = name.rpartition(".")  # a DICOM file may have none
    stem = stem if f"{dot}{extension}".lower() in IMAGE_EXTENSIONS else name
    names = (name, f"{stem}.png")  # a JPEG image's mask may be a PNG
    return tuple(f"{above}{kind}/{name}" for name in dict.fromkeys(names))


def is_hidden(path: str) -> bool:
    """Whether a file or a folder above it is hidden or left by an archive (``._x.png``, ``__MACOSX``)."""
    return path.startswith((".", "__MACOSX/")) or "/." in path or "/__MACOSX/" in path


def image_files(entries: Iterable[Entry]) -> list[Entry]:
    """Entries with the extension of an image, without hidden files or folders (``._x.png``, ``.ipynb_checkpoints``)."""
    return [entry for entry in entries if entry.path.lower().endswith(IMAGE_EXTENSIONS) and not is_hidden(entry.path)]
