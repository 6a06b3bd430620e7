"""Finds images that are probably no ordinary chest X-rays: inverted, rotated, cropped, padded, coloured, with text.

Suspects are for a person to look at; nothing is left out. The orientation is judged by the correlation with the mean
image of the data set itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from diffva_ray.data.encoding import quantise
from diffva_ray.data.images import MODES, is_dicom, open_image
from diffva_ray.data.phantoms import phantom

SIDE = 16  # pixels of a thumbnail
TEXT_SIDE = 512  # pixels of the shorter side in which text is searched
ENOUGH = 8  # thumbnails for a mean image of the data set
CLEAR = 0.1  # difference of two correlations that is taken as a difference
SIMILAR = 0.3  # correlation with the mean image that is taken as a chest; upright frontal images have 0.4 and more
FOREIGN = 0.25  # correlation below which an image is taken as no frontal chest X-ray in any orientation
MIN_GLYPHS = 5  # letters in one line; side markers have one or two
BRIGHT, RAISED = 0.75, 0.3  # of letters; their mean above the ground around them
COLOUR_SIDE = 128  # pixels of the thumbnail in which coloured pixels are counted
COLOUR_LEVELS = 32  # difference of a pixel's channels, of 255, that is clearly a colour
FLAT_BORDER = 0.2  # share of the width or height
ASPECTS = (0.6, 1.6)  # width / height
PARTS = tuple(  # of an image that may be a part of a chest: left, upper, right and lower edge as shares of the sides
    (x * (1 - width), y * (1 - height), x * (1 - width) + width, y * (1 - height) + height)
    for share in (0.5, 0.6)
    for width, height in ((share, 1), (1, share), (share, share))
    for x in ((0, 0.5, 1) if width < 1 else (0,))
    for y in ((0, 0.5, 1) if height < 1 else (0,))
)
# Correlation with a part of the mean image, and its excess over that with the whole. By experiments/suspects.py, they
# are exceeded by 4 of 311 and 4 of 421 whole images, by 77 and 83 % of left halves, 32 and 26 % of the middle 60 %.
A_PART, CLEAR_PART = 0.6, 0.25


class Traits(NamedTuple):
    """What is measured of one image."""

    thumbnail: NDArray[np.uint8]  # [SIDE, SIDE]
    aspect: float  # width / height
    border: float  # share of the width or height that is flat border
    glyphs: int  # bright shapes like letters in one line


def traits(image: NDArray[np.floating]) -> Traits:
    """Measures an image, float [H, W] in [0, 1]."""
    height, width = image.shape
    grey = Image.fromarray(quantise(image))
    shrink = max(1, min(image.shape) // TEXT_SIDE)
    small = np.asarray(grey.reduce(shrink), np.float32) / np.float32(255)
    thumbnail = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BOX))
    return Traits(thumbnail, width / height, max(_border(small), _border(small.T)), _glyphs(small))


def suspects(images: Mapping[str, Traits]) -> dict[str, list[str]]:
    """Reasons by path, of images that have any."""
    if not images:
        return {}
    thumbnails = _normed(np.stack([image.thumbnail for image in images.values()]).astype(np.float32))
    template, own = _template(thumbnails)
    turned = _correlations(thumbnails, template)
    found = {}
    parts = _part_correlations(thumbnails, template) if own else np.zeros(len(images), np.float32)
    for (path, image), correlations, part in zip(images.items(), turned, parts):
        reasons = [*_orientation(correlations, own), *_frame(image)]
        aspect = any(reason.startswith("cropped") for reason in reasons)
        if not aspect and part > A_PART and part - correlations.max() > CLEAR_PART:
            reasons.append("cropped? looks like a part of the other images")
        if reasons:
            found[path] = reasons
    return found


def _orientation(correlations: NDArray[np.float32], own: bool) -> list[str]:
    """The reason, from the correlations [4] of an image, turned by 0, 90, 180, 270 degrees, with an upright chest."""
    upright, turned = correlations[0], int(np.argmax(correlations[1:])) + 1
    if upright < -SIMILAR and -upright > correlations[turned] + CLEAR:
        return ["inverted? bone looks black"]
    if correlations[turned] > max(SIMILAR, upright + CLEAR):
        return [f"rotated? looks upright when turned by {90 * turned} degrees anticlockwise"]
    if own and correlations.max() < FOREIGN:
        return ["not frontal, or oddly framed? unlike the other images of the data set"]
    return []


def _frame(image: Traits) -> list[str]:
    """Reasons that concern the edges, the shape and text."""
    reasons = []
    if image.border > FLAT_BORDER:
        reasons.append(f"padded? {image.border:.0%} of a side is flat border")
    if not ASPECTS[0] <= image.aspect <= ASPECTS[1]:
        reasons.append(f"cropped or stretched? width / height is {image.aspect:.2f}")
    if image.glyphs >= MIN_GLYPHS:
        reasons.append(f"text? {image.glyphs} bright shapes like letters in one line")
    return reasons


def _normed(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Images [N, H, W] with mean 0 and norm 1."""
    centred = images - images.mean((1, 2), keepdims=True)
    norm: NDArray[np.float32] = np.linalg.norm(centred, axis=(1, 2), keepdims=True)
    normed: NDArray[np.float32] = centred / np.maximum(norm, np.float32(1e-6))
    return normed


def _correlations(images: NDArray[np.float32], template: NDArray[np.float32]) -> NDArray[np.float32]:
    """Correlations [N, 4] of the images, turned by 0, 90, 180 and 270 degrees, with the template [H, W]."""
    return np.stack([(np.rot90(images, turns, (1, 2)) * template).sum((1, 2)) for turns in range(4)], axis=1)


def _part_correlations(images: NDArray[np.float32], template: NDArray[np.float32]) -> NDArray[np.float32]:
    """The largest correlation [N] of each image with one of the PARTS of the template."""
    whole = Image.fromarray(template)
    boxes = [(SIDE * left, SIDE * top, SIDE * right, SIDE * bottom) for left, top, right, bottom in PARTS]
    parts = [np.asarray(whole.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box)) for box in boxes]
    largest: NDArray[np.float32] = np.tensordot(images, _normed(np.stack(parts)), ([1, 2], [1, 2])).max(1)
    return largest


def _template(images: NDArray[np.float32]) -> tuple[NDArray[np.float32], bool]:
    """An upright chest: the mean of the data set's images that resemble a phantom, if they are ENOUGH (True), else the
    mean phantom (False). The mean of real images separates orientations much better."""
    correlations = _correlations(images, _phantom_template())
    typical = images[correlations[:, 0] > np.abs(correlations[:, 1:]).max(1) + CLEAR]
    if len(typical) < ENOUGH:
        return _phantom_template(), False
    return _symmetric(typical.mean(0)), True


@lru_cache(maxsize=1)
def _phantom_template() -> NDArray[np.float32]:
    images = [Image.fromarray(quantise(phantom("Normal", number, 0, 64).image)) for number in range(32)]
    thumbnails = [np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32) for image in images]
    return _symmetric(_normed(np.stack(thumbnails)).mean(0))


def _symmetric(image: NDArray[np.float32]) -> NDArray[np.float32]:
    symmetric: NDArray[np.float32] = _normed((image + image[:, ::-1])[None])[0]
    return symmetric


def _border(image: NDArray[np.floating]) -> float:
    """Share of the rows at the top and bottom of an image that have one value."""
    varied = np.flatnonzero(image.max(1) - image.min(1) > 0.02)
    return 1 - (varied[-1] + 1 - varied[0]) / len(image) if len(varied) else 1.0


def _glyphs(image: NDArray[np.floating]) -> int:
    """Number of bright shapes of a letter's size, in one line, on a darker ground."""
    height = len(image)
    labels, _ = ndimage.label(image >= BRIGHT)
    found = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        tall, wide = rows.stop - rows.start, columns.stop - columns.start
        if max(5, 0.015 * height) <= tall <= 0.06 * height and 0.2 * tall <= wide <= 1.6 * tall:
            around = slice(max(0, rows.start - 2), rows.stop + 2), slice(max(0, columns.start - 2), columns.stop + 2)
            shape = labels[around] == number
            if (
                0.2 < shape.sum() / (tall * wide) < 0.9
                and image[around][shape].mean() - np.median(image[around][~shape]) > RAISED
            ):
                found.append((rows.start, tall))
    tops = np.array(found, float).reshape(-1, 2)
    near = np.abs(tops[:, None] - tops[None]) <= 0.3 * tops[:, None, 1:]
    return int(near.all(2).sum(1).max(initial=0))


def coloured_share(data: bytes) -> float:
    """Share of the pixels of a file that are clearly coloured; 0 for grey images and DICOM. The file can be decoded."""
    if is_dicom(data):
        return 0.0
    _, image = open_image(data)
    if image.mode in MODES and image.mode != "P":
        return 0.0
    image.draft("RGB", (COLOUR_SIDE, COLOUR_SIDE))  # a JPEG is decoded at a fraction of its size
    pixels = np.asarray(image.convert("RGB").resize((COLOUR_SIDE, COLOUR_SIDE), Image.Resampling.BOX), np.int16)
    return float((np.ptp(pixels, axis=2) > COLOUR_LEVELS).mean())
