"""Phantoms: synthetic chest X-rays with a known lesion, lesion mask and ground-truth counterfactual.

This is *phantom v1*, frozen before any model was tuned on it; docs/phantoms.md has its statistics, which a test checks.
Anatomy, distractors, noise and lesion have separate random streams, so an image and its ground-truth counterfactual
show the same patient with the same noise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from diffva_ray.config.recipe import DataConfig
from diffva_ray.data.encoding import encode_grey, encode_mask, quantise
from diffva_ray.data.lesions import LESIONS, Lesion, distractors
from diffva_ray.data.thorax import Thorax, grid, lattice_noise
from diffva_ray.progress import LOG
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import Store

VERSION = "phantom v1"
MIN_SIDE = 16  # pixels
CLASSES = ("Normal", "Lung_Opacity", "COVID", "Viral Pneumonia")
ALL_CLASSES = ("Normal", *LESIONS)
DEFAULTS = DataConfig()
CAPTIONS = "captions.csv"  # manifest of a set's images, for training with captions instead of class prompts
VISIBLE = 0.05  # difference of image and ground-truth counterfactual above which a pixel belongs to the lesion


@dataclass(frozen=True)
class Phantom:
    """One synthetic image with its ground truth.

    Attributes:
        image: The image, float32 [size, size] in [0, 1].
        ground_truth: The ground-truth counterfactual: the image without the lesion, float32 [size, size] in [0, 1].
        lungs: Lung mask without the heart, bool [size, size].
        lesion: Lesion mask, bool [size, size]; empty for ``Normal``.
        label: The class, one of ALL_CLASSES.
        factors: Parameters of the lesion, such as sides, severity and grade.
    """

    image: NDArray[np.float32]
    ground_truth: NDArray[np.float32]
    lungs: NDArray[np.bool_]
    lesion: NDArray[np.bool_]
    label: str
    factors: dict[str, object]


def phantom(label: str, patient: int, seed: int = 0, size: int = 64) -> Phantom:
    """Generates a synthetic chest X-ray with its ground truth. The same arguments give the same image.

        >>> made = phantom("COVID", patient=7, size=32)
        >>> normal = phantom("Normal", patient=7, size=32)
        >>> made.image.shape, bool(made.lesion.any()), bool((normal.image == made.ground_truth).all())
        ((32, 32), True, True)

    Args:
        label: The class, one of ALL_CLASSES.
        patient: Number of the patient; the anatomy depends on patient and seed only.
        seed: Random seed of the set.
        size: Side of the image in pixels, 16 or more.

    Returns:
        The image, its ground-truth counterfactual, masks and parameters.

    Raises:
        ValueError: The label is unknown, or ``size`` is below 16.
    """
    if label not in ALL_CLASSES:
        raise ValueError(f"unknown phantom class {label!r}; there are {', '.join(ALL_CLASSES)}")
    if size < MIN_SIDE:
        raise ValueError(f"the side of a phantom is at least {MIN_SIDE} pixels, got {size}")
    anatomy, foreign, exposure, disease = np.random.SeedSequence([seed, patient]).spawn(4)
    thorax = Thorax.sample(np.random.default_rng(anatomy))
    lesions = []
    if label != "Normal":
        lesions.append(LESIONS[label](np.random.default_rng(disease), thorax, *thorax.coordinates(*grid(size))))
    factors = lesions[0].factors if lesions else {}
    return exposed(thorax, lesions, label, factors, foreign, exposure, size)


def exposed(
    thorax: Thorax,
    lesions: Sequence[Lesion],
    label: str,
    factors: dict[str, object],
    foreign: np.random.SeedSequence,
    exposure: np.random.SeedSequence,
    size: int,
) -> Phantom:
    """A patient with lesions [size, size] as a phantom; ``foreign`` and ``exposure`` seed distractors and exposure."""
    image_u, image_v = grid(size)
    u, v = thorax.coordinates(image_u, image_v)
    width = max(0.016, 1.0 / size)  # edges are at least a pixel wide
    objects = distractors(np.random.default_rng(foreign), image_u, image_v)
    develop = _Exposure(np.random.default_rng(exposure), size)
    # expose the patient without and with the lesions
    healthy = thorax.density(u, v, width)
    ground_truth = develop(healthy + objects)
    image = develop(_ill(thorax, lesions, healthy, u, v, width) + objects) if lesions else ground_truth
    # masks
    lungs = np.maximum(thorax.lung(u, v, -1), thorax.lung(u, v, 1)) * np.ones_like(u)
    visible = (lungs > 0) & (thorax.heart(u, v) < 0)
    return Phantom(image, ground_truth, visible, visible_lesion(image, ground_truth, label), label, factors)


def visible_lesion(image: NDArray[np.floating], ground_truth: NDArray[np.floating], label: str) -> NDArray[np.bool_]:
    """Mask of the pixels where an image [size, size] in [0, 1] and its ground-truth counterfactual differ by more than
    VISIBLE."""
    difference = np.abs(image - ground_truth)
    if label == "Viral Pneumonia":  # blurred, to mark the zone instead of the threads of the mesh
        difference = ndimage.gaussian_filter(difference, 1.5 / 64 * len(image))
    return difference > VISIBLE


def _ill(
    thorax: Thorax, lesions: Sequence[Lesion], healthy: np.ndarray, u: np.ndarray, v: np.ndarray, width: float
) -> np.ndarray:
    """Density [size, size] of the patient with the lesions."""
    # the anatomy that the lesions displace or enlarge
    density: NDArray[np.float64] = healthy
    pushes = [lesion.push for lesion in lesions if lesion.push is not None]
    heart_scale = math.prod(lesion.heart_scale for lesion in lesions)
    if pushes or heart_scale != 1.0:
        du, dv = (sum(parts) for parts in zip(*pushes, strict=True)) if pushes else (0.0, 0.0)
        density = thorax.density(u + du, v + dv, width, heart_scale)
    # their tissue in the lungs
    air = thorax.lungs(u, v, width, heart_scale)
    for lesion in lesions:
        opacity = lesion.opacity * air
        density = density + opacity * (lesion.towards - density)
        if lesion.extra is not None:
            density = density + lesion.extra * air
    return density


def caption(prompt: str, factors: Mapping[str, Any]) -> str:
    """Caption of a phantom: "severe Lung Opacity on the left", "mild COVID 19, bilateral".

    ``prompt`` is the prompt of the class and ``factors`` those of the image; without grade and sides, the caption is
    the prompt.
    """
    where = {1: " on the {}", 2: ", bilateral"}.get(len(factors.get("sides", ())), "")
    graded = f"{factors['grade']} {prompt}" if "grade" in factors else prompt
    return graded + where.format(*factors.get("sides", ()))


class _Exposure:
    """Converts densities to grey levels with a sampled gain, gamma, fog and noise.

    The same instance exposes an image and its ground-truth counterfactual.
    """

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self.gain, self.gamma, self.fog = rng.uniform(0.95, 1.2), rng.uniform(0.85, 1.2), rng.uniform(0.0, 0.05)
        self.texture = 0.032 * lattice_noise(rng, 5, size) + 0.018 * lattice_noise(rng, 14, size)
        self.mottle = 0.012 * lattice_noise(rng, 48, size)

    def __call__(self, density: np.ndarray) -> NDArray[np.float32]:
        """Image float32 [size, size] in [0, 1]."""
        bright = np.clip(density + self.texture * np.clip(density / 0.3, 0, 1), 0.0, None)
        image = self.fog + self.gain * bright**self.gamma
        return np.clip(image + self.mottle, 0.0, 1.0).astype(np.float32)


def phantom_set(
    store: Store, patients: int, size: int = 64, seed: int = 0, classes: Sequence[str] = CLASSES
) -> Iterator[str]:
    """Writes a set of phantoms in the Radiography layout (``images``, ``masks``, ``lesions``, ``ground_truth``).

    Also writes ``captions.csv``, a manifest with captions made of DataConfig's prompts, and last ``phantoms.json``,
    which lists every image with its factors.

    Args:
        store: Where to write.
        patients: Number of images; patient k has the k-th class, modulo the number of classes.
        size: Side of the images in pixels, 16 or more.
        seed: Random seed of the set.
        classes: Classes of the images, from ALL_CLASSES.

    Yields:
        The path of each image after it was written.

    Raises:
        ValueError: A class is unknown, or ``size`` is below 16.
    """
    unknown = [label for label in classes if label not in ALL_CLASSES]
    if unknown:
        raise ValueError(f"unknown phantom class {unknown[0]!r}; there are {', '.join(ALL_CLASSES)}")
    # write the images
    images = []
    for patient in range(patients):
        label = classes[patient % len(classes)]
        result = phantom(label, patient, seed, size)
        image, ground_truth = quantise(result.image), quantise(result.ground_truth)
        path = write_image(store, label, patient, image, result.lungs, result.lesion, ground_truth)
        images.append({"file": path, "label": label, "patient": patient, **result.factors})
        yield path
    # write the captions, then the list of images
    lines = [
        f'{image["file"]},{image["label"]},"{caption(DEFAULTS.prompt(str(image["label"])), image)}"' for image in images
    ]
    store.put(CAPTIONS, "\n".join(["path,label,caption", *lines, ""]).encode())
    metadata = {"version": VERSION, "seed": seed, "size": size, "classes": list(classes), "images": images}
    store.put("phantoms.json", json.dumps(metadata, indent=1).encode())


def write_image(
    store: Store,
    label: str,
    number: int,
    image: NDArray[np.uint8],
    lungs: NDArray[np.bool_],
    lesion: NDArray[np.bool_],
    ground_truth: NDArray[np.uint8],
) -> str:
    """Writes the ``number``-th image [size, size] of a set (from 0) in the Radiography layout; returns its path.

    Also writes the lung mask and, unless the image is normal, the lesion mask and the ground-truth counterfactual.
    """
    name = f"{label}-{number + 1}.png"
    store.put(f"{label}/images/{name}", encode_grey(image))
    store.put(f"{label}/masks/{name}", encode_mask(lungs))
    if label != "Normal":
        store.put(f"{label}/lesions/{name}", encode_mask(lesion))
        store.put(f"{label}/ground_truth/{name}", encode_grey(ground_truth))
    return f"{label}/images/{name}"


def make_phantoms(uri: str, patients: int, size: int, seed: int) -> None:
    """Writes the set of ``phantom_set`` to ``uri``, unless it exists already."""
    store = open_store(uri)
    if not store.exists("phantoms.json"):
        LOG.info("making %d phantoms in %s", patients, uri)
        for _ in phantom_set(store, patients, size, seed):
            pass
