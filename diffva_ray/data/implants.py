"""Phantom lesions in real healthy images, whose originals are then the exact ground truth.

A lesion is drawn as for a phantom, in coordinates that fit this image's lungs, and scaled from phantom densities to the
grey levels of this image. It is added to the image, so ribs and vessels stay visible through it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from diffva_ray.data.dataset import Dataset, LabelledImage, UnusableData
from diffva_ray.data.encoding import quantise
from diffva_ray.data.images import BadImage, decode_mask, decode_square
from diffva_ray.data.lesions import LESIONS, Lesion
from diffva_ray.data.lungs import find_lungs
from diffva_ray.data.phantoms import CLASSES, visible_lesion, write_image
from diffva_ray.data.thorax import Array
from diffva_ray.progress import LOG
from diffva_ray.schema import Mask
from diffva_ray.storage.store import Store

VERSION = "implants v1"
INSIDE_LUNGS = ("Lung_Opacity", "COVID", "Viral Pneumonia", "Pneumothorax")  # the others move heart and vessels
LUNG_BOX = (-0.74, 0.74, -0.80, 0.50)  # left, right, top, bottom of a phantom's lungs, in its coordinates
AIR, TISSUE = 0.29, 0.62  # what a phantom's lung and an opacity come to, in its densities
FLAT = 0.15  # an image whose lungs are darker than their surroundings by less is passed over
CONTRASTS = (0.20, 0.45)  # grey levels between lung and tissue that a lesion is scaled to, at least and at most
DRAWS = 12  # of a lesion, until one is plainly visible
PLAIN = 0.004  # of the image's area: the least a lesion covers

Grey = NDArray[np.uint8]


class NoLungs(ValueError):
    """An image no lesion can be put into; the message is one line that says why."""


@dataclass(frozen=True)
class Host:
    """A real image that receives a lesion: grey levels uint8 [size, size], lungs bool [size, size]."""

    image: LabelledImage
    pixels: Grey
    lungs: Mask
    found: bool  # the lungs were searched for; there was no mask


@dataclass(frozen=True)
class Implant:
    """An image with its lesion; ``image`` uint8 and ``lesion`` bool, [size, size]. The host's pixels are the
    ground truth."""

    image: Grey
    lesion: Mask
    factors: dict[str, object] = field(default_factory=dict)


class Lungs:
    """The lungs of a real image in the coordinates of a phantom's: the anatomy that ``lesions`` asks for.

    ``mask`` is bool [size, size]. Raises NoLungs unless it shows a lung on either side.
    """

    def __init__(self, mask: Mask) -> None:
        size = mask.shape[0]
        sides = _sides(mask)
        rows, columns = (np.flatnonzero((sides != 0).any(axis=axis)) for axis in (1, 0))
        left, right, top, bottom = LUNG_BOX
        self._column, self._row = float(columns[0]), float(rows[0])
        self._across = (right - left) / (columns[-1] - columns[0] + 1)  # patient's coordinates per pixel
        self._down = (bottom - top) / (rows[-1] - rows[0] + 1)
        pixels = np.arange(size)
        self.u, self.v = np.meshgrid(
            left + (pixels - self._column + 0.5) * self._across, top + (pixels - self._row + 0.5) * self._down
        )
        self._distance = {side: _signed_distance(sides == side, self._down, self._across) for side in (-1, 1)}

    def lung(self, u: Array, v: Array, side: int) -> Array:
        """Signed distance to the border of one lung (side -1: image left), positive inside."""
        column = np.ravel(u - LUNG_BOX[0]) / self._across + self._column - 0.5
        row = np.ravel(v - LUNG_BOX[2]) / self._down + self._row - 0.5
        found = ndimage.map_coordinates(self._distance[side], [row, column], order=1, mode="nearest")
        return found.reshape(np.shape(u))

    def heart(self, u: Array, v: Array) -> Array:
        """The heart is not in a mask of the lungs, so nowhere is inside it."""
        return np.full_like(np.asarray(u, np.float64), -1.0)

    @property
    def air(self) -> Array:
        """How much of a lesion a pixel may show, [size, size]: 0 outside the lungs, 1 a little inside them."""
        inside = np.maximum(self._distance[-1], self._distance[1])
        return np.clip(inside / 0.03, 0, 1)


def _sides(mask: Mask) -> NDArray[np.int8]:
    """-1 in the lung at the image's left, 1 in the other, 0 elsewhere. Specks are no lungs. Raises NoLungs."""
    labels, count = ndimage.label(mask)
    areas = ndimage.sum_labels(mask, labels, range(1, count + 1))
    large = [n + 1 for n, area in enumerate(areas) if area > 0.01 * mask.size]
    sides = np.zeros(mask.shape, np.int8)
    if len(large) == 1:  # lungs that touch, with the heart between them
        columns = np.flatnonzero(mask.any(axis=0))
        left = np.arange(mask.shape[1]) < (columns[0] + columns[-1] + 1) / 2
        sides[labels == large[0]] = 1
        sides[(sides == 1) & left] = -1
    else:
        middles = {n: ndimage.center_of_mass(labels == n)[1] for n in large}
        middle = np.mean([min(middles.values()), max(middles.values())]) if middles else 0.0
        for n, at in middles.items():
            sides[labels == n] = -1 if at < middle else 1
    if min((sides == -1).mean(), (sides == 1).mean()) < 0.01:
        raise NoLungs("its mask does not show two lungs")
    return sides


def _signed_distance(lung: Mask, down: float, across: float) -> Array:
    inside, outside = (ndimage.distance_transform_edt(part, sampling=(down, across)) for part in (lung, ~lung))
    return np.where(lung, inside, -outside)


def implant(host: Host, label: str, seed: int, number: int) -> Implant:
    """The host with a lesion of class ``label``, the same for the same arguments.

    LabelledImage and ground truth are equal outside the lungs, and the lesion mask (differences above 0.05, as for
    phantoms) lies inside them. Raises KeyError for an unknown label, NoLungs where no lesion can be made visible.
    """
    lungs = Lungs(host.lungs)
    ground_truth = host.pixels.astype(np.float64) / 255
    air, tissue = _levels(ground_truth, host.lungs)
    if tissue - air < FLAT:
        raise NoLungs("its lungs are hardly darker than what surrounds them")
    contrast = float(np.clip(tissue - air, *CONTRASTS)) / (TISSUE - AIR)  # grey levels per unit of a phantom's density
    for draw in range(DRAWS):
        rng = np.random.default_rng(np.random.SeedSequence([seed, number, draw]))
        lesion = LESIONS[label](rng, lungs, lungs.u, lungs.v)
        image = quantise(_ill(ground_truth, lesion, lungs, host.lungs, air, contrast))
        visible = visible_lesion(image.astype(np.float64) / 255, ground_truth, label) & host.lungs
        if visible.mean() >= PLAIN:
            return Implant(image, visible, lesion.factors)
    raise NoLungs(f"no {label} can be made visible in it")


def _ill(ground_truth: Array, lesion: Lesion, lungs: Lungs, mask: Mask, air: float, contrast: float) -> Array:
    """The image with the lesion, [size, size] in [0, 1]."""
    towards = air + contrast * (lesion.towards - AIR)
    # towards tissue from the image without its ribs and vessels, so that these remain in the lesion
    background = _inside(ground_truth, mask, 0.03 * len(ground_truth))
    change = lesion.opacity * (towards - 0.5 * (background + ground_truth))
    brighter = lesion.towards > AIR
    change = np.where(brighter, np.maximum(change, 0), np.minimum(change, 0))
    if lesion.extra is not None:
        change = change + contrast * lesion.extra
    return np.clip(ground_truth + change * lungs.air, 0, 1)


def _levels(ground_truth: Array, mask: Mask) -> tuple[float, float]:
    """Grey levels of the lungs and of what surrounds them."""
    steps = max(round(0.06 * len(ground_truth)), 2)
    around = ndimage.binary_dilation(mask, iterations=steps) & ~ndimage.binary_dilation(mask, iterations=1)
    return float(np.median(ground_truth[mask])), float(np.median(ground_truth[around]))


def _inside(ground_truth: Array, mask: Mask, sigma: float) -> Array:
    """The image blurred inside the lungs alone: what is bright beside them does not leak in."""
    weight = ndimage.gaussian_filter(mask.astype(np.float64), sigma)
    return ndimage.gaussian_filter(np.where(mask, ground_truth, 0.0), sigma) / np.maximum(weight, 1e-3)


class Hosts:
    """The healthy images of a data set that can receive a lesion, on a square of ``size`` pixels.

    LabelledImage k of a set is the k-th of them, and after the last comes the first again. Images are read when they
    are needed; one that cannot be used is passed over and said. Raises UnusableData when the set has no image of class
    ``healthy``, or none that can be used.
    """

    def __init__(self, dataset: Dataset, healthy: str, size: int) -> None:
        self.store, self.size, self.bits, self.unusable = dataset.store, size, dataset.bits, 0
        self._images = [image for image in dataset.images if image.label == healthy]
        if not self._images:
            raise UnusableData(
                f"{dataset.store.uri}: no image of the healthy class {healthy!r}; there are "
                f"{', '.join(dataset.classes)}"
            )

    def __len__(self) -> int:
        """Healthy images not found unusable so far."""
        return len(self._images)

    def __getitem__(self, number: int) -> Host:
        while self._images:
            image = self._images[number % len(self._images)]
            try:
                return self._read(image)
            except (BadImage, NoLungs, OSError) as error:
                self.drop(image, str(error))
        raise UnusableData(f"{self.store.uri}: none of its {self.unusable} healthy images can be used")

    def drop(self, image: LabelledImage, reason: str) -> None:
        """Pass over an image from now on. Images before it keep their numbers."""
        LOG.info("%s is passed over: %s", image.path, reason)
        self._images.remove(image)
        self.unusable += 1

    def _read(self, image: LabelledImage) -> Host:
        pixels = quantise(decode_square(self.store.read(image.path), self.size, bits=self.bits)[0])
        if image.lung_mask:
            lungs: Mask | None = decode_mask(self.store.read(image.lung_mask), self.size)
        else:
            lungs = find_lungs(pixels.astype(np.float32) / np.float32(255))
        if lungs is None:
            raise NoLungs("it has no lung mask, and its lungs cannot be told by their darkness")
        _sides(lungs)
        return Host(image, pixels, lungs, not image.lung_mask)


def implant_set(
    store: Store,
    dataset: Dataset,
    healthy: str,
    patients: int,
    size: int,
    seed: int = 0,
    classes: Sequence[str] = CLASSES,
) -> Iterator[str]:
    """Write ``patients`` images of ``size`` pixels, classes in turn, in the layout of a phantom set; yields each path.

    LabelledImage k is made of the k-th healthy image that can be used, modulo their number; ``Normal`` images are these
    images as they are. ``implants.json``, written last, lists every image with its source and factors. Raises
    UnusableData for an unknown class, for ``store`` inside the data set, and where no healthy image can be used.
    """
    known = ("Normal", *INSIDE_LUNGS)
    unknown = [label for label in classes if label not in known]
    if unknown:
        raise UnusableData(f"no class {unknown[0]!r} can be put into an image; there are {', '.join(known)}")
    if f"{store.uri}/".startswith(f"{dataset.store.uri}/"):
        raise UnusableData(f"{store.uri}: lies in the data set whose images are read; choose another folder")
    hosts = Hosts(dataset, healthy, size)
    images = []
    for number in range(patients):
        label = classes[number % len(classes)]
        host, made = _host_with(hosts, label, seed, number)
        path = write_image(store, label, number, made.image, host.lungs, made.lesion, host.pixels)
        lungs = "searched" if host.found else "mask"
        images.append({"file": path, "label": label, "source": host.image.path, "lungs": lungs, **made.factors})
        yield path
    about_set = {"version": VERSION, "seed": seed, "size": size, "classes": list(classes), "onto": dataset.store.uri}
    store.put("implants.json", json.dumps({**about_set, "images": images}, indent=1).encode())


def _host_with(hosts: Hosts, label: str, seed: int, number: int) -> tuple[Host, Implant]:
    while True:
        host = hosts[number]
        if label == "Normal":
            return host, Implant(host.pixels, np.zeros_like(host.lungs))
        try:
            return host, implant(host, label, seed, number)
        except NoLungs as error:
            hosts.drop(host.image, str(error))
