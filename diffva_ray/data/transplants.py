"""Lesions cut out of abnormal images and blended into healthy ones, as a source of realistic pairs.

The patch keeps its own gradients; a membrane over it takes up the difference of grey levels at its border (Pérez,
Gangnet and Blake 2003, "Poisson image editing", equations 2 to 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse
from scipy.sparse.linalg import spsolve

from diffva_ray.data.dataset import Dataset, LabelledImage, UnusableData
from diffva_ray.data.encoding import quantise
from diffva_ray.data.images import BadImage, decode_square
from diffva_ray.data.thorax import Array
from diffva_ray.schema import Mask

MIN_SIDE = 0.04  # of a patch, as a fraction of the image
MARGIN = 0.15  # of the box, added on each side to have healthy tissue at the border
ANYWHERE = (0.12, 0.88, 0.12, 0.90)  # left, right, top, bottom of the part of an image that patches are cut from


@dataclass(frozen=True)
class Donor:
    """An abnormal image and the part of it that is cut out, in fractions of the image; none: anywhere."""

    image: LabelledImage
    box: tuple[float, float, float, float] | None = None  # left, top, right, bottom


class Donors:
    """The abnormal images of a data set by class.

    With ``boxes``, the outlined lesions are cut out; without, any part of an abnormal image. Raises UnusableData when
    there is no such image of one of ``classes``.
    """

    def __init__(self, dataset: Dataset, healthy: str, classes: Sequence[str], size: int, boxes: bool) -> None:
        self.dataset, self.size = dataset, size
        self.of: dict[str, list[Donor]] = {label: [] for label in classes if label != healthy}
        self._pixels: dict[str, NDArray[np.uint8]] = {}
        for image in dataset.images:
            if image.label not in self.of:
                continue
            self.of[image.label] += self._boxes(image) if boxes else [Donor(image)]
        for label, donors in self.of.items():
            if not donors:
                what = "outlined lesion" if boxes else "image"
                raise UnusableData(f"{dataset.store.uri}: no {what} of class {label!r} to cut out")

    def _boxes(self, image: LabelledImage) -> list[Donor]:
        """A donor for each outlined lesion of the image, of whatever label."""
        found = []
        for shape in self.dataset.shapes.get(image.path, ()):
            mask = shape.on_square(self.size, self.size, self.size)
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            if len(rows) >= MIN_SIDE * self.size and len(columns) >= MIN_SIDE * self.size:
                edges = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
                left, top, right, bottom = (float(edge) / self.size for edge in edges)
                found.append(Donor(image, (left, top, right, bottom)))
        return found

    def pixels(self, donor: Donor) -> Array:
        """The donor's image, [size, size] in [0, 1]. Raises BadImage or OSError when it cannot be read."""
        path = donor.image.path
        if path not in self._pixels:
            data = self.dataset.store.read(path)
            self._pixels[path] = quantise(decode_square(data, self.size, bits=self.dataset.bits)[0])
        return self._pixels[path].astype(np.float64) / 255


@dataclass(frozen=True)
class Transplanted:
    """A healthy image with a transplanted patch."""

    image: Array  # [size, size] in [0, 1]
    lesion: Mask  # where the patch is, bool [size, size]
    factors: dict[str, object]


def transplant(host: Array, lungs: Mask, donors: Donors, label: str, rng: np.random.Generator) -> Transplanted | None:
    """Blend a patch of class ``label`` into the host [size, size] in [0, 1]; None: this patch does not fit.

    The patch is mirrored half of the time, scaled by at most a fifth, and keeps its place within the chest up to a
    tenth of the image.
    """
    size = len(host)
    donor = donors.of[label][int(rng.integers(len(donors.of[label])))]
    try:
        source = donors.pixels(donor)
    except (BadImage, OSError):
        donors.of[label].remove(donor)
        if not donors.of[label]:
            raise UnusableData(f"{donors.dataset.store.uri}: no image of class {label!r} can be read") from None
        return None
    box = donor.box or _anywhere(rng)
    if rng.random() < 0.5:
        source, box = source[:, ::-1], (1 - box[2], box[1], 1 - box[0], box[3])
    # where the patch goes: the box with its margin, scaled and moved
    scale = np.exp(rng.uniform(-0.2, 0.2, 2))
    move = rng.normal(size=2) * 0.05
    centre = np.array([(box[1] + box[3]) / 2, (box[0] + box[2]) / 2])
    half = np.array([box[3] - box[1], box[2] - box[0]]) / 2
    target = np.clip(centre + move, 0.1, 0.9)
    first = np.clip(np.floor((target - half * scale * (1 + 2 * MARGIN)) * size), 1, size - 2).astype(int)
    last = np.clip(np.ceil((target + half * scale * (1 + 2 * MARGIN)) * size), 2, size - 1).astype(int)
    if min(last - first) < 4:
        return None
    # its pixels
    rows, columns = (np.arange(first[k], last[k]) for k in (0, 1))
    at = [((line + 0.5) / size - target[k]) / scale[k] + centre[k] for k, line in enumerate((rows, columns))]
    grid = np.meshgrid(at[0] * size - 0.5, at[1] * size - 0.5, indexing="ij")
    patch = ndimage.map_coordinates(source, grid, order=1, mode="nearest")
    # its shape: the box as a rounded rectangle
    y, x = ((line + 0.5) / size - target[k] for k, line in enumerate((rows, columns)))
    roundness = rng.uniform(2.0, 6.0)
    away = np.abs(y[:, None] / (half[0] * scale[0])) ** roundness + np.abs(x[None] / (half[1] * scale[1])) ** roundness
    region = away ** (1 / roundness) < 1 + MARGIN
    if region.all() or (region & lungs[first[0] : last[0], first[1] : last[1]]).sum() < 0.35 * region.sum():
        return None
    image = host.copy()
    part = image[first[0] : last[0], first[1] : last[1]]
    weight = np.clip((1 + MARGIN - away ** (1 / roundness)) / (2 * MARGIN), 0, 1)
    blended = patch + membrane(part - patch, region)
    part += weight * region * (blended - part)
    lesion = np.zeros(host.shape, bool)
    lesion[first[0] : last[0], first[1] : last[1]] = away ** (1 / roundness) < 1
    return Transplanted(np.clip(image, 0, 1), lesion, {"donor": donor.image.path})


def _anywhere(rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A random box in the chest, in fractions of the image."""
    left, right, top, bottom = ANYWHERE
    width, height = rng.uniform(0.10, 0.42), rng.uniform(0.10, 0.45)
    x, y = rng.uniform(left, right - width), rng.uniform(top, bottom - height)
    return x, y, x + width, y + height


def membrane(difference: Array, region: Mask) -> Array:
    """The harmonic function in ``region`` that equals ``difference`` around it, [h, w]; 0 outside the region.

    Solves Laplace's equation with the five-point stencil; pixels beyond the array count as equal to their neighbour.
    """
    inside = region.ravel()
    number = np.full(region.size, -1)
    number[inside] = np.arange(inside.sum())
    height, width = region.shape
    index = np.flatnonzero(inside)
    row, column = np.divmod(index, width)
    diagonal, right = np.zeros(len(index)), np.zeros(len(index))
    entries: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for down, across in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        there = (row + down >= 0) & (row + down < height) & (column + across >= 0) & (column + across < width)
        diagonal += there
        neighbour = index[there] + down * width + across
        free = inside[neighbour]
        entries.append((np.flatnonzero(there)[free], number[neighbour[free]]))
        np.add.at(right, np.flatnonzero(there)[~free], difference.ravel()[neighbour[~free]])
    rows, columns = (np.concatenate([entry[k] for entry in entries]) for k in (0, 1))
    system = sparse.csr_matrix((-np.ones(len(rows)), (rows, columns)), shape=(len(index), len(index)))
    solution = np.zeros(region.size)
    solution[inside] = spsolve(system + sparse.diags(diagonal), right)
    return solution.reshape(region.shape)
