"""Outlined lesions of a data set: boxes, polygons and run-length encoded masks, drawn as one mask."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw


@dataclass(frozen=True)
class Shape(ABC):
    """A lesion in pixels of an image of ``width`` x ``height``; 0: of the image file as it is.

    Attributes:
        label: Class that the shape belongs to; empty: every class of the image.
        width: Width of the image that the shape was drawn on.
        height: Its height.
    """

    label: str = ""
    width: int = 0
    height: int = 0

    @abstractmethod
    def mask(self, width: int, height: int) -> NDArray[np.bool_]:
        """The shape as bool [height, width]."""

    def on_square(self, width: int, height: int, size: int) -> NDArray[np.bool_]:
        """The shape on the square of ``size`` pixels to which an image file of ``width`` x ``height`` is squashed: the
        nearest pixels. A shape too small to be hit gets the pixel of its centre."""
        mask = self.mask(self.width or width, self.height or height)
        square = np.array(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))
        if mask.any() and not square.any():
            y, x = (np.argwhere(mask).mean(0) * size / mask.shape).astype(int)
            square[y, x] = True
        return square


@dataclass(frozen=True)
class Box(Shape):
    """A rectangle: x and y of its upper left corner, width and height."""

    x: float = 0
    y: float = 0
    w: float = 0
    h: float = 0

    def mask(self, width: int, height: int) -> NDArray[np.bool_]:
        mask = np.zeros((height, width), bool)
        left, top = max(0, round(self.x)), max(0, round(self.y))
        mask[top : max(top + 1, round(self.y + self.h)), left : max(left + 1, round(self.x + self.w))] = True
        return mask

    def on_square(self, width: int, height: int, size: int) -> NDArray[np.bool_]:
        """A pixel belongs to the box if the box holds its centre. A box too thin to hold one gets the pixel of its own
        centre. Parts outside the image are cut off."""
        mask = np.zeros((size, size), bool)
        rows = _span(self.y, self.h, size / (self.height or height))
        mask[rows, _span(self.x, self.w, size / (self.width or width))] = True
        return mask


def _span(start: float, length: float, scale: float) -> slice:
    first, last = int(np.ceil(start * scale - 0.5)), int(np.ceil((start + length) * scale - 0.5))
    if first == last:
        first = int(np.floor((start + length / 2) * scale))
        last = first + 1
    return slice(max(first, 0), max(last, 0))


@dataclass(frozen=True)
class Polygon(Shape):
    """A filled polygon; ``points`` are (x, y)."""

    points: tuple[tuple[float, float], ...] = ()

    def mask(self, width: int, height: int) -> NDArray[np.bool_]:
        image = Image.new("1", (width, height))
        ImageDraw.Draw(image).polygon(self.points, fill=1, outline=1)
        return np.asarray(image)


@dataclass(frozen=True)
class Runs(Shape):
    """A mask as numbers of pixels that are alternately outside and inside, down the columns from the left (COCO)."""

    counts: tuple[int, ...] = ()

    def mask(self, width: int, height: int) -> NDArray[np.bool_]:
        flat = np.repeat(np.arange(len(self.counts)) % 2 == 1, self.counts)[: width * height]
        return np.pad(flat, (0, width * height - len(flat))).reshape(width, height).T


def coco_counts(text: str) -> tuple[int, ...]:
    """The counts of COCO's compressed RLE string (pycocotools, ``rleFrString``): 5 bits per character, signed, and from
    the fourth count on the difference to the count before the last. Raises ValueError for other text."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"{character!r} is no character of a COCO mask")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:  # more characters follow
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift or min(counts, default=0) < 0:
        raise ValueError("not a COCO mask")
    return tuple(counts)


def runs_of(mask: NDArray[np.bool_]) -> list[int]:
    """The counts of ``Runs`` of a mask, bool [H, W]; the first is of pixels outside, and may be 0."""
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat, prepend=False, append=not flat[-1]))
    counts: list[int] = np.diff(edges, prepend=0).tolist()
    return counts


def coco_text(counts: Sequence[int]) -> str:
    """The counts of a mask as COCO's compressed RLE string; the inverse of ``coco_counts``."""
    text = ""
    for n, count in enumerate(counts):
        value = count - (counts[n - 2] if n > 2 else 0)
        while True:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += chr(48 + (bits | 32 if more else bits))
            if not more:
                break
    return text


def lesion_mask(shapes: Iterable[Shape], width: int, height: int, size: int) -> NDArray[np.bool_] | None:
    """Draw lesions as one mask on the model's square.

    Args:
        shapes: The outlined lesions.
        width: Width of the image file in pixels.
        height: Height of the image file in pixels.
        size: Side of the square to which the image is squashed.

    Returns:
        The mask, bool [size, size]; None without shapes.
    """
    masks = [shape.on_square(width, height, size) for shape in shapes]
    return np.logical_or.reduce(masks) if masks else None
