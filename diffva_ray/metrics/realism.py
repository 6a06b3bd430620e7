"""Do counterfactuals look like real healthy images? Questions to feature sets that a distance between sets does not
answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffva_ray.metrics.feature_set import Features, FeatureSet
from diffva_ray.metrics.manifold import MOST, squared_distances


@dataclass(frozen=True)
class Verisimilitude:
    """``taken``: share of counterfactuals whose nearest neighbour is a real healthy image, in [0, 1]; one half when the
    two sets cannot be told apart, 0 when every counterfactual gives itself away, above one half for copies of real
    images. ``n``: rows of each set, drawn to equal size; ``error``: standard error over counterfactuals."""

    taken: float
    error: float
    n: int


def verisimilitude(counterfactuals: Features, healthy: Features, seed: int = 0) -> Verisimilitude:
    """How often a counterfactual passes for real, by the leave-one-out nearest-neighbour two-sample test (Xu 2018) on
    features [N1, d] and [N2, d].

    ANT-GAN (Sun 2020) asks the same of its normal-looking images under this name; its own formula is not used here.
    Of more than MOST rows, MOST are drawn. Raises ValueError below two rows in a set.
    """
    size = min(len(counterfactuals), len(healthy), MOST)
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
    """``remote``: share of counterfactuals farther from the healthy images than 95 % of these are from each other (0.05
    is expected of real ones); ``between``: share that are remote and lie between two healthy images that are no
    neighbours. ``ratio``: median over counterfactuals of the distance to the nearest healthy image over that image's
    own nearest distance."""

    remote: float
    between: float
    ratio: float


def interpolation(counterfactuals: Features, healthy: Features, k: int = 5, seed: int = 0) -> Interpolation:
    """Mode interpolation (Aithal 2024): diffusion models make samples between the modes of their data, where no image
    is. Features [N1, d] of counterfactuals and [N2, d] of healthy images.

    Distances are means over the ``k`` nearest healthy images, of a healthy image without itself. A remote
    counterfactual t is between two modes when another healthy image b lies on the far side of it from its nearest one
    a: the angle a-t-b is above 120 degrees and t-b no longer than twice t-a. Beside a single mode there is no such
    image. Of more than MOST rows of a set, MOST are drawn. Raises ValueError for ``k`` + 1 healthy images or fewer, or
    without a counterfactual.
    """
    if len(healthy) <= k + 1 or not len(counterfactuals):
        raise ValueError(
            f"{k} neighbours need more than {k + 1} healthy images and a counterfactual, got {len(healthy)}"
        )
    random = np.random.default_rng(seed)
    counterfactuals, healthy = (FeatureSet.of(z).drawn(MOST, random).load() for z in (counterfactuals, healthy))
    own = np.sqrt(squared_distances(healthy, healthy))
    np.fill_diagonal(own, np.inf)
    to_healthy = np.sqrt(squared_distances(counterfactuals, healthy))
    limit = np.quantile(np.sort(own, axis=1)[:, :k].mean(axis=1), 0.95)
    remote = np.sort(to_healthy, axis=1)[:, :k].mean(axis=1) > limit
    nearest = to_healthy.argmin(axis=1)
    at = to_healthy[np.arange(len(counterfactuals)), nearest]
    between = np.zeros(len(counterfactuals), bool)
    for n in np.flatnonzero(remote):
        arrows = healthy - counterfactuals[n]
        cosine = arrows @ arrows[nearest[n]] / np.maximum(to_healthy[n] * at[n], 1e-12)
        between[n] = bool(((cosine < -0.5) & (to_healthy[n] <= 2 * at[n])).any())
    gaps = np.maximum(own.min(axis=1)[nearest], 1e-12)
    return Interpolation(float(remote.mean()), float(between.mean()), float(np.median(at / gaps)))


def directions(images: Features, counterfactuals: Features, healthy: Features) -> NDArray[np.float64]:
    """Directional agreement [N] in [-1, 1]: cosine between what generating changes in an image's features
    (counterfactual - image, [N, d]) and the way from its class to the healthy images [M, d] (difference of means; the
    image itself is left out of its class's, or its own noise would count as agreement).

    With text and image encoders of one space (StyleGAN-NADA's CLIP direction) the way would be that between two
    prompts; the text encoder here has no such image encoder, so classes of real images stand for the prompts. NaN where
    nothing changes. Raises ValueError for sets of unequal shape or below three images.
    """
    before, after, real = (FeatureSet.of(z) for z in (images, counterfactuals, healthy))
    if len(before) != len(after) or before.dimension != after.dimension or len(before) < 3 or not len(real):
        raise ValueError(f"images and counterfactuals are [N, d] with N >= 3, got {len(before)} and {len(after)} rows")
    total = sum(rows.sum(axis=0) for rows in before.blocks())
    target = sum(rows.sum(axis=0) for rows in real.blocks()) / len(real)
    found = []
    for own, generated in zip(before.blocks(), after.blocks(), strict=True):
        others = (total - own) / (len(before) - 1)
        change, way = generated - own, target - others
        lengths = np.linalg.norm(change, axis=1) * np.linalg.norm(way, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append(np.where(lengths > 0, (change * way).sum(axis=1) / lengths, np.nan))
    return np.concatenate(found)
