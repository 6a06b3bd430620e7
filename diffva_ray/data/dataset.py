"""An image, and a data set of images: what every adapter returns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from diffva_ray.data.images import IMAGE_EXTENSIONS
from diffva_ray.storage.store import Entry, Store


@dataclass(frozen=True)
class LabelledImage:
    """One image under one label. Paths are relative to the data root; empty where there is no such file."""

    path: str
    label: str
    size: int = -1  # bytes; -1 when the file is absent
    lung_mask: str = ""
    lesion_mask: str = ""
    ground_truth: str = ""  # the ground-truth counterfactual of a phantom
    caption: str = ""  # what training tells of this image; empty: its class's prompt


@dataclass(frozen=True)
class Dataset:
    """Images in a fixed order (by path, then label), with what the adapter wants to say about them."""

    store: Store
    images: list[LabelledImage]
    kind: str
    notes: list[str] = field(default_factory=list)
    boxes: dict[str, list[tuple[float, float, float, float]]] = field(default_factory=dict)  # path -> x, y, w, h
    bits: int = 16  # that the values of its 16-bit grey files have (``data.bits``)

    @property
    def classes(self) -> dict[str, int]:
        """Number of images by class, in alphabetical order."""
        counts: dict[str, int] = {}
        for image in self.images:
            counts[image.label] = counts.get(image.label, 0) + 1
        return dict(sorted(counts.items()))


class UnusableData(ValueError):
    """A data set that cannot be used; the message is one line that names it and says what is expected."""


def companions(path: str, kind: str) -> tuple[str, ...]:
    """Where the mask or ground truth of the image at ``path`` may lie, likeliest first: under the image's own name in a
    folder ``kind`` (``masks``, ``lesions``, ``ground_truth``) beside its ``images/``, or in the folder that holds the
    image."""
    name = path.rpartition("/")[2]
    folder = path[: len(path) - len(name)]
    above = folder.removesuffix("images/") if f"/{folder}".endswith("/images/") else folder
    names = (name, f"{name.rpartition('.')[0]}.png")  # a JPEG image's mask may be a PNG
    return tuple(f"{above}{kind}/{name}" for name in dict.fromkeys(names))


def image_files(entries: Iterable[Entry]) -> list[Entry]:
    """The entries named like an image; hidden files and folders (``._x.png``, ``.ipynb_checkpoints``) are left out."""
    return [
        entry
        for entry in entries
        if entry.path.lower().endswith(IMAGE_EXTENSIONS) and not entry.path.startswith(".") and "/." not in entry.path
    ]
