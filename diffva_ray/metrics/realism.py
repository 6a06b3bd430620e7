"""Realism of counterfactuals in feature space, beside real healthy images: tests that go beyond a distance of sets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffva_ray.metrics.feature_set import Features, FeatureSet
from diffva_ray.metrics.manifold import MAX_ROWS, squared_distances


@dataclass(frozen=True)
class Verisimilitude:
    """How often a counterfactual passes for a real healthy image."""

    # Share of counterfactuals whose nearest neighbour is a real healthy image, in [0, 1]: 1/2 if the sets cannot be
    # distinguished, 0 if every counterfactual can, above 1/2 for copies of real images.
    taken: float
    error: float  # standard error over counterfactuals
    n: int  # rows of each set, sampled to equal size


def verisimilitude(counterfactuals: Features, healthy: Features, seed: int = 0) -> Verisimilitude:
    """Leave-one-out nearest-neighbour two-sample test (Xu 2018) of features [N1, d] of counterfactuals against [N2, d]
    of real healthy images. Raises ValueError for fewer than two rows in a set.

    ANT-GAN (Sun 2020) asks the same of its normal-looking images under this name; its own formula is not used here.
    Larger sets are sampled down to MAX_ROWS."""
    size = min(len(counterfactuals), len(healthy), MAX_ROWS)
    if size < 2:
        raise ValueError(
            f"a nearest-neighbour test needs 2 images in each set, got {len(counterfactuals)} and {len(healthy)}"
        )
    random = np.random.default_rng(seed)
    counterfactuals, healthy = (
        FeatureSet.of(z).take(random.choice(len(z), size, replace=False)).load() for z in (counterfactuals, healthy)
    )
    among = squared_distances(counterfactuals, counterfactuals)
    np.fill_diagonal(among, np.inf)
    nearest, real = among.min(axis=1), squared_distances(counterfactuals, healthy).min(axis=1)
    taken = np.where(real < nearest, 1.0, np.where(real == nearest, 0.5, 0.0))
    return Verisimilitude(float(taken.mean()), float(taken.std() / np.sqrt(size)), size)


@dataclass(frozen=True)
class Interpolation:
    """Counterfactuals far from all healthy images."""

    remote: float  # share farther from healthy images than 95 % of these from each other (0.05 expected of real ones)
    between: float  # share that are remote and between two healthy images that are no neighbours
    ratio: float  # median of the distance to the nearest healthy image over that image's own nearest distance


def interpolation(counterfactuals: Features, healthy: Features, k: int = 5, seed: int = 0) -> Interpolation:
    """Mode interpolation (Aithal 2024): diffusion models generate samples between the modes of their data. Features are
    [N1, d] of counterfactuals and [N2, d] of real healthy images.

    Distances are means over the ``k`` nearest healthy images (not counting the image itself). A remote counterfactual t
    with the nearest healthy image a is between two modes if another healthy image b is on its far side: the angle a-t-b
    exceeds 120 degrees and t-b is at most twice t-a. Beside a single mode there is no such image. Larger sets are
    sampled down to MAX_ROWS. Raises ValueError for ``k`` + 1 healthy images or fewer, or no counterfactual."""
    if len(healthy) <= k + 1 or not len(counterfactuals):
        raise ValueError(
            f"{k} neighbours need more than {k + 1} healthy images and a counterfactual, got {len(healthy)}"
        )
    random = np.random.default_rng(seed)
    counterfactuals, healthy = (FeatureSet.of(z).sampled(MAX_ROWS, random).load() for z in (counterfactuals, healthy))
    # Counterfactuals farther from healthy images than these are from each other.
    own = np.sqrt(squared_distances(healthy, healthy))
    np.fill_diagonal(own, np.inf)
    to_healthy = np.sqrt(squared_distances(counterfactuals, healthy))
    limit = np.quantile(np.sort(own, axis=1)[:, :k].mean(axis=1), 0.95)
    remote = np.sort(to_healthy, axis=1)[:, :k].mean(axis=1) > limit

    # Those of them with a healthy image on the far side.
    nearest = to_healthy.argmin(axis=1)
    distance = to_healthy[np.arange(len(counterfactuals)), nearest]
    between = np.zeros(len(counterfactuals), bool)
    for n in np.flatnonzero(remote):
        arrows = healthy - counterfactuals[n]
        cosine = arrows @ arrows[nearest[n]] / np.maximum(to_healthy[n] * distance[n], 1e-12)
        between[n] = bool(((cosine < -0.5) & (to_healthy[n] <= 2 * distance[n])).any())
    gaps = np.maximum(own.min(axis=1)[nearest], 1e-12)
    return Interpolation(float(remote.mean()), float(between.mean()), float(np.median(distance / gaps)))


def directions(images: Features, counterfactuals: Features, healthy: Features) -> NDArray[np.float64]:
    """Directional agreement: cosines [N] in [-1, 1] between each edit and the way from the image's class to the healthy
    images; NaN where nothing changes. Features are [N, d], [N, d] row by row, and [M, d].

    The edit is counterfactual - image; the way is the difference of the means of healthy images and of the class
    without the image itself, whose own noise would count as agreement. StyleGAN-NADA's CLIP direction is between two
    prompts; here text and images share no encoder, so the class means replace the prompts. Raises ValueError for fewer
    than three images, or another shape."""
    before, after, real = (FeatureSet.of(z) for z in (images, counterfactuals, healthy))
    if len(before) != len(after) or before.dimension != after.dimension or len(before) < 3 or not len(real):
        raise ValueError(f"images and counterfactuals are [N, d] with N >= 3, got {len(before)} and {len(after)} rows")
    total = sum(rows.sum(axis=0) for rows in before.blocks())
    target = sum(rows.sum(axis=0) for rows in real.blocks()) / len(real)
    cosines = []
    for old, new in zip(before.blocks(), after.blocks(), strict=True):
        others = (total - old) / (len(before) - 1)
        change, way = new - old, target - others
        lengths = np.linalg.norm(change, axis=1) * np.linalg.norm(way, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            cosines.append(np.where(lengths > 0, (change * way).sum(axis=1) / lengths, np.nan))
    return np.concatenate(cosines)
