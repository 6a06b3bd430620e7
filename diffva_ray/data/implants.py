"""Adds lesions to real healthy images; the original image is the exact ground-truth counterfactual.

A lesion is drawn in the coordinates of a phantom, which are fitted to the lungs of the image, and scaled from phantom
densities to the grey levels of the image. It is added to the image, so ribs and vessels stay visible through it. Or it
is cut out of an abnormal image of the data set (``transplants``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from diffva_ray.data.acquisition import Acquisition
from diffva_ray.data.dataset import Dataset, LabelledImage, UnusableData
from diffva_ray.data.encoding import quantise
from diffva_ray.data.findings import FINDINGS
from diffva_ray.data.images import BadImage, decode_mask, decode_square
from diffva_ray.data.lesions import LESIONS, Lesion
from diffva_ray.data.lungs import find_lungs
from diffva_ray.data.phantoms import CLASSES, visible_lesion, write_image
from diffva_ray.data.thorax import Array
from diffva_ray.data.transplants import Donors, transplant
from diffva_ray.progress import LOG
from diffva_ray.schema import Mask
from diffva_ray.storage.store import Store

VERSION = "implants v2"
DRAWN = {label: LESIONS[label] for label in ("COVID", "Viral Pneumonia")} | FINDINGS  # by class
LUNG_BOX = (-0.74, 0.74, -0.80, 0.50)  # left, right, top, bottom of a phantom's lungs, in its coordinates
AIR, TISSUE = 0.29, 0.62  # densities of a phantom's lung and of an opacity
MIN_LUNG_CONTRAST = 0.15  # grey levels between lungs and surroundings; an image with less is skipped
CONTRASTS = (0.20, 0.45)  # minimum and maximum contrast of lung and tissue that a lesion is scaled to, in grey levels
MAX_PLACES = 4  # attempts at a position that keeps both lungs in the image
MAX_ATTEMPTS = 12  # at sampling a lesion that is visible enough
MIN_LESION_AREA = 0.004  # visible area of a lesion, as a fraction of the image

Grey = NDArray[np.uint8]


class NoLungs(ValueError):
    """An image that cannot receive a lesion; the message is one line that gives the reason."""


@dataclass(frozen=True)
class Host:
    """A real healthy image that receives a lesion."""

    image: LabelledImage  # its entry in the data set
    pixels: Grey  # grey levels, uint8 [size, size]
    lungs: Mask  # lung mask, bool [size, size]
    searched: bool  # the lungs were found by ``find_lungs``, because the image has no lung mask


@dataclass(frozen=True)
class Implant:
    """An image with an added lesion, and its ground-truth counterfactual."""

    image: Grey  # uint8 [size, size]
    ground_truth: Grey  # the host, uint8 [size, size]
    lungs: Mask  # bool [size, size]
    lesion: Mask  # bool [size, size]
    factors: dict[str, object] = field(default_factory=dict)  # parameters of the lesion, such as side and severity


class Lungs:
    """The lungs of a real image in the coordinates of a phantom; implements ``lesions.Anatomy``.

    ``mask`` is bool [size, size]. Raises NoLungs unless the mask has a lung on each side.
    """

    def __init__(self, mask: Mask) -> None:
        size = mask.shape[0]
        sides = _sides(mask)
        rows, columns = (np.flatnonzero((sides != 0).any(axis=axis)) for axis in (1, 0))
        left, right, top, bottom = LUNG_BOX
        self._column, self._row = float(columns[0]), float(rows[0])
        self._across = (right - left) / (columns[-1] - columns[0] + 1)  # phantom coordinates per pixel
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
        distance: Array = ndimage.map_coordinates(self._distance[side], [row, column], order=1, mode="nearest")
        return distance.reshape(np.shape(u))

    def heart(self, u: Array, v: Array) -> Array:
        """Constant -1 (outside): a lung mask does not show the heart."""
        return np.full_like(np.asarray(u, np.float64), -1.0)

    @property
    def air(self) -> Array:
        """Weight of a lesion at each pixel, [size, size]: 0 outside the lungs, rising to 1 just inside their border."""
        inside = np.maximum(self._distance[-1], self._distance[1])
        return np.clip(inside / 0.03, 0, 1)


def _sides(mask: Mask) -> NDArray[np.int8]:
    """int8 [size, size]: -1 in the lung at the image's left, 1 in the other, 0 elsewhere.

    Ignores regions below 1 % of the image. Raises NoLungs unless both lungs are found.
    """
    # regions of a plausible size
    labels, count = ndimage.label(mask)
    areas = ndimage.sum_labels(mask, labels, range(1, count + 1))
    large = [n + 1 for n, area in enumerate(areas) if area > 0.01 * mask.size]
    sides = np.zeros(mask.shape, np.int8)
    if len(large) == 1:  # the lungs touch: split the region at its middle column
        columns = np.flatnonzero(mask.any(axis=0))
        left = np.arange(mask.shape[1]) < (columns[0] + columns[-1] + 1) / 2
        sides[labels == large[0]] = 1
        sides[(sides == 1) & left] = -1
    else:  # assign each region to the side of its centre
        middles = {n: ndimage.center_of_mass(labels == n)[1] for n in large}
        middle = np.mean([min(middles.values()), max(middles.values())]) if middles else 0.0
        for n, at in middles.items():
            sides[labels == n] = -1 if at < middle else 1
    if min((sides == -1).mean(), (sides == 1).mean()) < 0.01:
        raise NoLungs("its mask does not show two lungs")
    return sides


def _signed_distance(lung: Mask, down: float, across: float) -> Array:
    """Distance to the border of a mask, positive inside; ``down`` and ``across``: height and width of a pixel."""
    inside, outside = (ndimage.distance_transform_edt(part, sampling=(down, across)) for part in (lung, ~lung))
    distance: Array = np.where(lung, inside, -outside)
    return distance


def implant(host: Host, label: str, seed: int, number: int) -> Implant:
    """Adds a lesion of class ``label`` to the host. The same arguments give the same result.

    Outside the lungs the image equals its ground-truth counterfactual. The lesion mask (differences above 0.05, as for
    phantoms) is inside the lungs. Raises KeyError for an unknown label, and NoLungs when no visible lesion can be made.
    """
    # measure the contrast of lungs and tissue in this image
    lungs = Lungs(host.lungs)
    ground_truth = host.pixels.astype(np.float64) / 255
    air, tissue = _levels(ground_truth, host.lungs)
    if tissue - air < MIN_LUNG_CONTRAST:
        raise NoLungs("its lungs are hardly darker than their surroundings")
    contrast = float(np.clip(tissue - air, *CONTRASTS)) / (TISSUE - AIR)  # grey levels per unit of a phantom's density
    # sample lesions until one is visible enough
    for attempt in range(MAX_ATTEMPTS):
        rng = np.random.default_rng(np.random.SeedSequence([seed, number, attempt]))
        lesion = DRAWN[label](rng, lungs, lungs.u, lungs.v)
        image = quantise(_ill(ground_truth, lesion, lungs, host.lungs, air, contrast))
        visible = visible_lesion(image.astype(np.float64) / 255, ground_truth, label) & host.lungs
        if visible.mean() >= MIN_LESION_AREA:
            return Implant(image, host.pixels, host.lungs, visible, lesion.factors)
    raise NoLungs(f"no visible {label} can be added to it")


def _ill(ground_truth: Array, lesion: Lesion, lungs: Lungs, mask: Mask, air: float, contrast: float) -> Array:
    """The image with the lesion, [size, size] in [0, 1]."""
    towards = air + contrast * (lesion.towards - AIR)
    # start from the mean of the image and its blurred version, so that ribs and vessels remain visible in the lesion
    background = _inside(ground_truth, mask, 0.03 * len(ground_truth))
    change = lesion.opacity * (towards - 0.5 * (background + ground_truth))
    brighter = lesion.towards > AIR
    change = np.where(brighter, np.maximum(change, 0), np.minimum(change, 0))
    if lesion.extra is not None:
        change = change + contrast * lesion.extra
    return np.clip(ground_truth + change * lungs.air, 0, 1)


def _levels(ground_truth: Array, mask: Mask) -> tuple[float, float]:
    """Median grey levels of the lungs and of their surroundings."""
    steps = max(round(0.06 * len(ground_truth)), 2)
    around = ndimage.binary_dilation(mask, iterations=steps) & ~ndimage.binary_dilation(mask, iterations=1)
    return float(np.median(ground_truth[mask])), float(np.median(ground_truth[around]))


def _inside(ground_truth: Array, mask: Mask, sigma: float) -> Array:
    """The image blurred inside the lungs only, so that bright tissue beside the lungs does not leak in."""
    weight = ndimage.gaussian_filter(mask.astype(np.float64), sigma)
    inside: Array = ndimage.gaussian_filter(np.where(mask, ground_truth, 0.0), sigma) / np.maximum(weight, 1e-3)
    return inside


class Hosts:
    """The healthy images of a data set that can receive a lesion, resized to ``size`` x ``size`` pixels.

    Item k is the k-th usable image, modulo their number. Images are read on demand; an unusable image is logged and
    removed. Raises UnusableData when the data set has no image of class ``healthy``, or no usable one.
    """

    def __init__(self, dataset: Dataset, healthy: str, size: int) -> None:
        self.store, self.size, self.bits, self.unusable = dataset.store, size, dataset.bits, 0
        self._images = [image for image in dataset.images if image.label == healthy]
        if not self._images:
            raise UnusableData(
                f"{dataset.store.uri}: no image of the healthy class {healthy!r}; there are "
                f"{', '.join(dataset.classes)}"
            )

    def __getitem__(self, number: int) -> Host:
        while self._images:
            image = self._images[number % len(self._images)]
            try:
                return self._read(image)
            except (BadImage, NoLungs, OSError) as error:
                self.drop(image, str(error))
        raise UnusableData(f"{self.store.uri}: none of its {self.unusable} healthy images can be used")

    def drop(self, image: LabelledImage, reason: str) -> None:
        """Removes an unusable image. Images before it keep their numbers."""
        LOG.info("%s is skipped: %s", image.path, reason)
        self._images.remove(image)
        self.unusable += 1

    def _read(self, image: LabelledImage) -> Host:
        pixels = quantise(decode_square(self.store.read(image.path), self.size, bits=self.bits)[0])
        if image.lung_mask:
            lungs: Mask | None = decode_mask(self.store.read(image.lung_mask), self.size)
        else:
            lungs = find_lungs(pixels.astype(np.float32) / np.float32(255))
        if lungs is None:
            raise NoLungs("it has no lung mask, and no lungs were found in it")
        _sides(lungs)
        return Host(image, pixels, lungs, not image.lung_mask)


@dataclass(frozen=True)
class Source:
    """Where the lesions of a set come from, and how their images vary.

    Attributes:
        seed: Random seed of the set.
        vary: Also vary position, exposure, sharpness, noise and devices of image and ground truth alike.
        donors: Abnormal images that lesions are cut out of; None: lesions are drawn.
    """

    seed: int = 0
    vary: bool = False
    donors: Donors | None = None


def implant_set(
    store: Store,
    dataset: Dataset,
    healthy: str,
    patients: int,
    size: int,
    source: Source = Source(),
    classes: Sequence[str] = CLASSES,
) -> Iterator[str]:
    """Writes ``patients`` images of ``size`` x ``size`` pixels in the layout of a phantom set; yields each path.

    Image k has the k-th of ``classes`` and the k-th usable healthy image, both modulo their number; a ``Normal`` image
    is the healthy image itself. ``implants.json``, written last, lists every image with its source and factors. Raises
    UnusableData for an unknown class, for ``store`` inside the data set, and when no healthy image is usable.
    """
    # check the arguments
    supported = ("Normal", *(source.donors.of if source.donors else DRAWN))
    unknown = [label for label in classes if label not in supported]
    if unknown:
        raise UnusableData(f"no class {unknown[0]!r} can be added to an image; there are {', '.join(supported)}")
    if f"{store.uri}/".startswith(f"{dataset.store.uri}/"):
        raise UnusableData(f"{store.uri}: is inside the data set whose images are read; choose another folder")
    # write the images, then the list of them
    hosts = Hosts(dataset, healthy, size)
    images = []
    for number in range(patients):
        label = classes[number % len(classes)]
        host, made = _made(hosts, label, source, number)
        path = write_image(store, label, number, made.image, made.lungs, made.lesion, made.ground_truth)
        lungs = "searched" if host.searched else "mask"
        images.append({"file": path, "label": label, "source": host.image.path, "lungs": lungs, **made.factors})
        yield path
    metadata = {"version": VERSION, "seed": source.seed, "size": size, "classes": list(classes)}
    origin = {"onto": dataset.store.uri, "vary": source.vary, "transplants": source.donors is not None}
    store.put("implants.json", json.dumps({**metadata, **origin, "images": images}, indent=1).encode())


def _made(hosts: Hosts, label: str, source: Source, number: int) -> tuple[Host, Implant]:
    """The first host from ``number`` on that can show the lesion, and the image made of it; removes the others."""
    while True:
        host = hosts[number]
        for attempt in range(MAX_PLACES if source.vary else 1):
            try:
                return host, _one(host, label, source, number, attempt)
            except NoLungs as error:
                reason = str(error)
        hosts.drop(host.image, reason)


def _one(host: Host, label: str, source: Source, number: int, attempt: int) -> Implant:
    """The host with a lesion, in one sampled position and exposure if the set varies."""
    acquisition = None
    if source.vary:
        seeds = np.random.SeedSequence([source.seed, number, attempt, 1])
        acquisition = Acquisition(np.random.default_rng(seeds), len(host.pixels))
        pixels = quantise(acquisition.place(host.pixels) / 255)
        host = replace(host, pixels=pixels, lungs=acquisition.place_mask(host.lungs))
    if label == "Normal":
        made = Implant(host.pixels, host.pixels, host.lungs, np.zeros_like(host.lungs))
    elif source.donors is not None:
        made = _transplanted(host, label, source.donors, source.seed, number)
    else:
        made = implant(host, label, source.seed, number)
    if acquisition is None:
        return made
    image, truth = (quantise(acquisition.expose(one / 255)) for one in (made.image, made.ground_truth))
    return replace(made, image=image, ground_truth=truth)


def _transplanted(host: Host, label: str, donors: Donors, seed: int, number: int) -> Implant:
    """The host with a lesion of another image. Raises NoLungs when none of some patches fits."""
    ground_truth = host.pixels.astype(np.float64) / 255
    for attempt in range(MAX_ATTEMPTS):
        rng = np.random.default_rng(np.random.SeedSequence([seed, number, attempt, 2]))
        found = transplant(ground_truth, host.lungs, donors, label, rng)
        if found is None:
            continue
        image = quantise(found.image)
        visible = visible_lesion(image.astype(np.float64) / 255, ground_truth, label) & found.lesion
        if visible.mean() >= MIN_LESION_AREA:
            return Implant(image, host.pixels, host.lungs, visible, found.factors)
    raise NoLungs(f"no {label} of another image fits into it")
