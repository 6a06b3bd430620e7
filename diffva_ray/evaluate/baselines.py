"""Chooses the settings of the baselines of attribution maps, and makes their maps of each image.

Each baseline has its own smoothing, chosen with its threshold by AUROC on the images of a validation run, which also
give the learned prior. Principal components are of normal images, at most SIDE pixels wide.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffva_ray.config.recipe import DataConfig
from diffva_ray.data.dataset import Dataset, UnusableData
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.images import BadImage, decode_square, to_square
from diffva_ray.evaluate.annotations import lesion_shapes, of_finding
from diffva_ray.evaluate.options import Options
from diffva_ray.evaluate.records import Lesions, RecordImages, read_images, read_truth
from diffva_ray.evaluate.run_index import index_run
from diffva_ray.generate.run import Run, find_run
from diffva_ray.metrics.baselines import (
    BASELINES,
    COMPONENTS,
    SHUFFLED,
    WITH_PRIOR,
    NormalComponents,
    asymmetry,
    autoencoder_difference,
    brightness,
    centre_prior,
    learned_prior,
)
from diffva_ray.metrics.localization import fixed_threshold, iou_curves, on_grid, positive, score, smooth
from diffva_ray.schema import digest
from diffva_ray.storage.opening import open_store

Map = NDArray[np.float32]

SMOOTHINGS, NUMBERS = (0.0, 0.012, 0.024, 0.05), (10, 20, 40, 80)  # that are tried: of the width; of components
SIDE, NORMALS, VALIDATION, THREADS = 128, 1000, 150, 8  # pixels; most images that are read


@dataclass(frozen=True, kw_only=True, eq=False)
class Baselines:
    """What the baselines know from other images; the default is what they do without any."""

    smoothing: float  # of the run's own maps, as a fraction of the width
    own_smoothing: Mapping[str, float] = field(default_factory=dict)  # by name; others: ``smoothing``
    components: int = COMPONENTS
    normals: NormalComponents | None = None
    prior: Map | None = None  # learned prior
    others: Map | None = None  # our maps of the validation images, positive parts [n, side, side]
    thresholds: Mapping[str, float] = field(default_factory=dict)  # chosen with the smoothing, by name

    def maps(self, image: Map, reconstruction: Map | None) -> dict[str, Map]:
        """The smoothed positive part [size, size] of each baseline that applies, by name.

        ``image``: square, in [0, 1]; ``reconstruction``: likewise, None where there is no autoencoder."""
        size = len(image)
        signed = {"brightness": brightness(image), "asymmetry": asymmetry(image), "centre_prior": centre_prior(size)}
        if reconstruction is not None:
            signed["autoencoder_difference"] = autoencoder_difference(image, reconstruction)
        if self.normals is not None:
            small = to_square(image, self.normals.size)[None]
            signed["pca_residual"] = on_grid(self.normals.residual(small, self.components)[0], size)
        found = {name: positive(smooth(m, self.own_smoothing.get(name, self.smoothing))) for name, m in signed.items()}
        if self.prior is not None:
            found["learned_prior"] = self._smooth_prior(size)
            if self.normals is not None:
                found["pca_residual x prior"] = found["pca_residual"] * found["learned_prior"]
        return found

    @cache  # noqa: B019 - of the few objects of a reduction, for every image
    def _smooth_prior(self, size: int) -> Map:
        """The learned prior [size, size], with its own smoothing."""
        assert self.prior is not None
        return positive(smooth(on_grid(self.prior, size), self.own_smoothing.get("learned_prior", self.smoothing)))

    def beside(self, saliency: Map, path: str) -> dict[str, Map]:
        """Controls of our map of the image at ``path``, by name; empty without validation images.

        ``saliency``: its positive part [size, size]. The controls are this map times the learned prior, and the map of
        a validation image, which the path chooses, so that the tables do not depend on how a run is stored."""
        found, size = {}, len(saliency)
        if self.prior is not None:
            found[WITH_PRIOR] = saliency * self._smooth_prior(size)
        if self.others is not None:
            found[SHUFFLED] = on_grid(self.others[int(digest(path), 16) % len(self.others)], size)
        return found


def baselines_of(run: Run, data_uri: str, options: Options, notes: list[str]) -> Baselines:
    """The baselines of a run's maps.

    Their normal images are ``options.normals``, else those of the reference sets, else those of the data set at
    ``data_uri``. Raises UnusableData for ``options.normals`` that cannot be used."""
    config, smoothing = run.recipe.data, run.recipe.generate.smoothing
    references = [uri for label, uri in options.references if label == config.healthy_class and _run_at(uri) is None]
    uri = options.normals or (references or [data_uri])[0]
    normals = normal_images(uri, config, [] if options.normals else notes)
    if normals is None and options.normals:
        raise UnusableData(f"--normals {uri}: no image of class {config.healthy_class} there")
    return fit_baselines(normals, run.recipe.model.resolution, smoothing, options.threshold_from, notes)


def normal_images(uri: str, config: DataConfig, notes: list[str]) -> Dataset | None:
    """The images of the healthy class of a data set; None, with a note, if there are none."""
    try:
        return open_dataset(uri, config, [config.healthy_class])
    except UnusableData as error:
        notes.append(f"no normal images for the PCA baseline: {error}")
        return None


def fit_baselines(
    normals: Dataset | None, size: int, smoothing: float, threshold_from: str | None, notes: list[str]
) -> Baselines:
    """Baselines for maps [size, size] with ``smoothing``, with settings chosen on ``threshold_from``, if it is a run.

    Raises StoreError when a store fails."""
    baselines = Baselines(smoothing=smoothing, normals=read_normals(normals, size, notes) if normals else None)
    validation = None if threshold_from is None else _run_at(threshold_from)
    if validation is None:
        return baselines
    lesions = lesion_shapes(validation.about["data"], validation.recipe.data, None, [])
    return tuned(baselines, validation, lesions)


def _run_at(uri: str) -> Run | None:
    """The run at an address; None for a file and a folder that is no run."""
    return None if uri.lower().endswith((".csv", ".json", ".parquet")) else find_run(open_store(uri))


def with_own(thresholds: Mapping[str, float], baselines: Baselines | None) -> dict[str, float]:
    """The ``thresholds`` of a validation run by map; those of ``baselines`` belong to their own settings. A shuffled
    map has the threshold of the map."""
    found = dict(thresholds)
    if baselines is not None and baselines.thresholds:
        found = {name: value for name, value in found.items() if _map_of(name) not in BASELINES}
        found |= baselines.thresholds
    shuffled = {SHUFFLED + name[len("positive") :]: found[name] for name in found if _map_of(name) == "positive"}
    return found | shuffled


def _map_of(name: str) -> str:
    """The map of a name in a file of thresholds, without setting and class."""
    return re.split(" under | for ", name)[0]


def read_normals(dataset: Dataset, size: int, notes: list[str]) -> NormalComponents | None:
    """The components of the images of ``dataset``, at most NORMALS of them; None if fewer than two can be read. Images
    that cannot be read give a note."""

    def read(path: str) -> Map | None:
        try:
            return decode_square(dataset.store.read(path), min(size, SIDE), bits=dataset.bits)[0]
        except (OSError, BadImage):
            return None

    paths = sorted((image.path for image in dataset.images), key=digest)[:NORMALS]
    with ThreadPoolExecutor(THREADS) as pool:
        images = [image for image in pool.map(read, paths) if image is not None]
    if len(images) < len(paths):
        notes.append(f"{len(paths) - len(images)} of {len(paths)} normal images for the PCA baseline cannot be read")
    return NormalComponents.of(np.stack(images), max(NUMBERS)) if len(images) > 1 else None


@dataclass(frozen=True)
class _Example:
    """A validation image, at most SIDE pixels wide."""

    images: RecordImages
    label: str
    lesion: NDArray[np.bool_]
    region: NDArray[np.bool_] | None


class _Choice(NamedTuple):
    """The best setting of a baseline on the validation images."""

    auroc: float
    smoothing: float
    components: int
    thresholds: dict[str, float]  # for all classes, and for each


def tuned(baselines: Baselines, validation: Run, lesions: Lesions) -> Baselines:
    """Choose the settings and the prior on at most VALIDATION images with known lesions of a run.

    The prior of each of these images is the mean of the others' lesions. Without such an image nothing changes. Raises
    StoreError when the store fails."""
    examples = _examples(validation, lesions)
    if len(examples) < 2:
        return baselines
    best: dict[str, _Choice] = {}

    def consider(name: str, maps: Sequence[Map], fraction: float, components: int = COMPONENTS) -> None:
        scores = [(one.label, score(m, one.lesion, one.region)) for m, one in zip(maps, examples)]
        found = [(label, one) for label, one in scores if one is not None]
        mean = float(np.mean([one.auroc for _, one in found])) if found else -1.0
        if not found or (name in best and mean <= best[name].auroc):
            return
        thresholds = {name: fixed_threshold(np.stack([one.dice_curve for _, one in found]))[0]}
        for label in {label for label, _ in found}:
            curves = iou_curves(np.stack([one.dice_curve for other, one in found if other == label]))
            thresholds[of_finding(name, label)] = fixed_threshold(curves)[0]
        best[name] = _Choice(mean, fraction, components, thresholds)

    for name, components, signed in _candidates(baselines, examples):
        for fraction in SMOOTHINGS:
            consider(name, [positive(smooth(m, fraction)) for m in signed], fraction, components)
    masks = [example.lesion for example in examples]
    chosen = replace(
        baselines,
        own_smoothing={name: choice.smoothing for name, choice in best.items()},
        components=best["pca_residual"].components if "pca_residual" in best else baselines.components,
        prior=learned_prior(masks),
        others=np.stack([positive(example.images.signed_map) for example in examples]),
    )
    # the products, with the settings of their factors and each image's own prior
    products: dict[str, list[Map]] = {}
    for prior, example in zip(_other_priors(masks), examples):
        own = replace(chosen, prior=prior)
        found = {**own.maps(example.images.image, None), **own.beside(positive(example.images.signed_map), "")}
        for name in {"pca_residual x prior", WITH_PRIOR} & found.keys():
            products.setdefault(name, []).append(found[name])
    for name, maps in products.items():
        consider(name, maps, 0.0)
    return replace(chosen, thresholds={key: at for choice in best.values() for key, at in choice.thresholds.items()})


def _candidates(baselines: Baselines, examples: Sequence[_Example]) -> Iterator[tuple[str, int, list[Map]]]:
    """Yields (name, number of components, signed map of each example)."""
    images = [example.images.image for example in examples]
    yield "brightness", 0, [brightness(image) for image in images]
    yield "asymmetry", 0, [asymmetry(image) for image in images]
    yield "centre_prior", 0, [centre_prior(len(image)) for image in images]
    reconstructions = [example.images.reconstruction for example in examples]
    yield "autoencoder_difference", 0, [autoencoder_difference(*pair) for pair in zip(images, reconstructions)]
    yield "learned_prior", 0, _other_priors([example.lesion for example in examples])
    if (normals := baselines.normals) is not None:
        small = np.stack([to_square(image, normals.size) for image in images])
        for number in NUMBERS:
            yield "pca_residual", number, [on_grid(m, len(images[0])) for m in normals.residual(small, number)]


def _other_priors(masks: Sequence[NDArray[np.bool_]]) -> list[Map]:
    """For each mask the mean of all others."""
    total = np.sum(np.stack(masks), axis=0, dtype=np.float32)
    return [(total - mask) / np.float32(len(masks) - 1) for mask in masks]


def _examples(run: Run, lesions: Lesions) -> list[_Example]:
    """Validation images with a known lesion, one record of each: those that ``index_run`` samples, evenly spaced."""
    rows = {row["image_path"]: row for row in index_run(run, lesions).sampled}
    known = [row for row in rows.values() if row["lesion_mask_path"] or row["image_path"] in lesions]
    step = -(-len(known) // VALIDATION) or 1
    side, found = min(run.recipe.model.resolution, SIDE), list[_Example]()
    for row in known[::step]:
        try:
            images, truth = read_images(run, row), read_truth(run, row, lesions)
        except (OSError, BadImage):
            continue
        if truth.lesion is not None and truth.lesion.any():
            lesion = _small_mask(truth.lesion, side)
            region = None if truth.region is None else _small_mask(truth.region, side)
            found.append(_Example(_small_images(images, side), row["label"], lesion, region))
    return found


def _small_images(images: RecordImages, side: int) -> RecordImages:
    return RecordImages(*(on_grid(array, side) for array in vars(images).values()))


def _small_mask(mask: NDArray[np.bool_], side: int) -> NDArray[np.bool_]:
    """By majority; a mask that would vanish keeps its densest pixel."""
    share = on_grid(mask.astype(np.float32), side)
    small: NDArray[np.bool_] = share >= min(0.5, float(share.max()))
    return small
