"""Thorax phantoms: images whose lesions, lesion masks and ground-truth counterfactual are known. This is *phantom v1*,
frozen before any model was tuned on it; docs/phantoms.md has its statistics and a test holds them.

The anatomy, the distractors and the noise are drawn from streams of their own, before and apart from the lesion, so a
image and its ground truth are the same patient on the same day.
"""

from __future__ import annotations

import json
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
from diffva_ray.storage.store import Store, open_store

VERSION = "phantom v1"
SMALLEST = 16  # pixels a side
CLASSES = ("Normal", "Lung_Opacity", "COVID", "Viral Pneumonia")
ALL_CLASSES = ("Normal", *LESIONS)
DEFAULTS = DataConfig()
CAPTIONS = "captions.csv"  # a manifest of a set's images, for a training that is told more than the class
VISIBLE = 0.05  # a pixel belongs to the lesion when image and ground truth differ by more than this


@dataclass(frozen=True)
class Phantom:
    """One synthetic image and its truth; images float32 [size, size] in [0, 1], masks bool [size, size]."""

    image: NDArray[np.float32]
    ground_truth: NDArray[np.float32]
    lungs: NDArray[np.bool_]
    lesion: NDArray[np.bool_]
    label: str
    factors: dict[str, object]


def phantom(label: str, patient: int, seed: int = 0, size: int = 64) -> Phantom:
    """The image of patient number ``patient`` under one label of ALL_CLASSES, with its truth; ``size``: its side in
    pixels. The same arguments give the same image. Raises ValueError for an unknown label or fewer than 16 pixels.

        >>> made = phantom("COVID", patient=7, size=32)
        >>> normal = phantom("Normal", patient=7, size=32)
        >>> made.image.shape, bool(made.lesion.any()), bool((normal.image == made.ground_truth).all())
        ((32, 32), True, True)
    """
    if label not in ALL_CLASSES:
        raise ValueError(f"unknown phantom class {label!r}; there are {', '.join(ALL_CLASSES)}")
    if size < SMALLEST:
        raise ValueError(f"a phantom has a side of {SMALLEST} pixels or more, got {size}")
    anatomy, foreign, exposure, disease = np.random.SeedSequence([seed, patient]).spawn(4)
    thorax = Thorax.sample(np.random.default_rng(anatomy))
    image_u, image_v = grid(size)
    u, v = thorax.coordinates(image_u, image_v)
    width = max(0.016, 1.0 / size)  # an edge is never sharper than the pixel grid can show
    objects = distractors(np.random.default_rng(foreign), image_u, image_v)
    rng = np.random.default_rng(exposure)
    develop = _Exposure(rng, size)

    healthy = thorax.density(u, v, width)
    ground_truth = develop(healthy + objects)
    if label == "Normal":
        lesion = Lesion(np.zeros_like(u), np.zeros_like(u))
        image = ground_truth
    else:
        lesion = LESIONS[label](np.random.default_rng(disease), thorax, u, v)
        image = develop(_ill(thorax, lesion, healthy, u, v, width) + objects)
    lungs = np.maximum(thorax.lung(u, v, -1), thorax.lung(u, v, 1)) * np.ones_like(u)
    visible = (lungs > 0) & (thorax.heart(u, v) < 0)
    return Phantom(image, ground_truth, visible, visible_lesion(image, ground_truth, label), label, lesion.factors)


def visible_lesion(image: NDArray[np.floating], ground_truth: NDArray[np.floating], label: str) -> NDArray[np.bool_]:
    """Where an image [size, size] in [0, 1] differs from its ground truth by more than VISIBLE."""
    difference = np.abs(image - ground_truth)
    if label == "Viral Pneumonia":  # the zone, not each thread of the mesh
        difference = ndimage.gaussian_filter(difference, 1.5 / 64 * len(image))
    return difference > VISIBLE


def _ill(thorax: Thorax, lesion: Lesion, healthy: np.ndarray, u: np.ndarray, v: np.ndarray, width: float) -> np.ndarray:
    density = healthy
    if lesion.push is not None:
        density = thorax.density(u + lesion.push[0], v + lesion.push[1], width)
    elif lesion.heart_scale != 1.0:
        density = thorax.density(u, v, width, lesion.heart_scale)
    air = thorax.lungs(u, v, width)
    opacity = lesion.opacity * air
    density = density + opacity * (lesion.towards - density)
    if lesion.extra is not None:
        density = density + lesion.extra * air
    return density


def caption(prompt: str, factors: Mapping[str, Any]) -> str:
    """What is to be seen on an image, in words: "severe Lung Opacity on the left", "mild COVID 19, bilateral".

    ``prompt`` is the class's own; ``factors`` the image's. Without a grade and sides it is the prompt alone.
    """
    where = {1: " on the {}", 2: ", bilateral"}.get(len(factors.get("sides", ())), "")
    graded = f"{factors['grade']} {prompt}" if "grade" in factors else prompt
    return graded + where.format(*factors.get("sides", ()))


class _Exposure:
    """From density to image: gain, gamma, collimation, mottle. One draw serves image and ground truth."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self.gain, self.gamma, self.fog = rng.uniform(0.95, 1.2), rng.uniform(0.85, 1.2), rng.uniform(0.0, 0.05)
        self.texture = 0.032 * lattice_noise(rng, 5, size) + 0.018 * lattice_noise(rng, 14, size)
        self.mottle = 0.012 * lattice_noise(rng, 48, size)

    def __call__(self, density: np.ndarray) -> NDArray[np.float32]:
        bright = np.clip(density + self.texture * np.clip(density / 0.3, 0, 1), 0.0, None)
        image = self.fog + self.gain * bright**self.gamma
        return np.clip(image + self.mottle, 0.0, 1.0).astype(np.float32)


def phantom_set(
    store: Store, patients: int, size: int = 64, seed: int = 0, classes: Sequence[str] = CLASSES
) -> Iterator[str]:
    """Write ``patients`` images, classes in turn, in the Radiography layout (images, masks, lesions, ground truth);
    yields each image's path. ``captions.csv`` is a manifest with the captions of DataConfig's prompts;
    ``phantoms.json``, written last, lists every image with its factors."""
    unknown = [label for label in classes if label not in ALL_CLASSES]
    if unknown:
        raise ValueError(f"unknown phantom class {unknown[0]!r}; there are {', '.join(ALL_CLASSES)}")
    images = []
    for patient in range(patients):
        label = classes[patient % len(classes)]
        made = phantom(label, patient, seed, size)
        image, ground_truth = quantise(made.image), quantise(made.ground_truth)
        path = write_image(store, label, patient, image, made.lungs, made.lesion, ground_truth)
        images.append({"file": path, "label": label, "patient": patient, **made.factors})
        yield path
    lines = [
        f'{image["file"]},{image["label"]},"{caption(DEFAULTS.prompt(str(image["label"])), image)}"' for image in images
    ]
    store.put(CAPTIONS, "\n".join(["path,label,caption", *lines, ""]).encode())
    about = {"version": VERSION, "seed": seed, "size": size, "classes": list(classes), "images": images}
    store.put("phantoms.json", json.dumps(about, indent=1).encode())


def write_image(
    store: Store,
    label: str,
    number: int,
    image: NDArray[np.uint8],
    lungs: NDArray[np.bool_],
    lesion: NDArray[np.bool_],
    ground_truth: NDArray[np.uint8],
) -> str:
    """Write the ``number``-th image [size, size] of a set (from 0) in the Radiography layout, with its masks and its
    ground truth; a normal image has neither lesion nor ground truth. Returns the image's path."""
    name = f"{label}-{number + 1}.png"
    store.put(f"{label}/images/{name}", encode_grey(image))
    store.put(f"{label}/masks/{name}", encode_mask(lungs))
    if label != "Normal":
        store.put(f"{label}/lesions/{name}", encode_mask(lesion))
        store.put(f"{label}/ground_truth/{name}", encode_grey(ground_truth))
    return f"{label}/images/{name}"


def make_phantoms(uri: str, patients: int, size: int, seed: int) -> None:
    """The set ``phantom_set`` writes, at ``uri``, unless it is there already."""
    store = open_store(uri)
    if not store.exists("phantoms.json"):
        LOG.info("making %d phantoms in %s", patients, uri)
        for _ in phantom_set(store, patients, size, seed):
            pass
