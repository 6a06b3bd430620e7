"""What one Frechet distance hides: its bias of order 1/N (FID-infinity), that an image meets its own edit (split
halves), and that classes differ (distance within each condition).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from diffva_ray.metrics.feature_set import Features, FeatureSet
from diffva_ray.metrics.fid import frechet_distance_features

INVERSE_FRACTIONS = (1.25, 1.5, 1.75, 2.0)  # both sets are drawn down to 80 % ... 50 %
MOST = 50_000  # rows of a set, as in Chong & Forsyth; beyond, the bias is below what a table shows


@dataclass(frozen=True)
class Extrapolation:
    """``value`` at infinite N, in squared units of the features; ``error`` of the fitted intercept, which is not a
    sampling error; ``r_squared`` of the line. ``trusted``: the smallest draw still has more rows than dimensions; below
    that the bias is no longer proportional to 1/N and the value remains too high."""

    value: float
    error: float
    r_squared: float
    trusted: bool


def infinity(x: Features, y: Features, draws: int = 4, seed: int = 0) -> Extrapolation:
    """FID-infinity (Chong & Forsyth 2020) of features [N1, d] and [N2, d].

    Both sets are drawn down, without replacement, to the same fractions f; the distance is D + c/f to first order
    (c = a/N1 + b/N2), so a line over 1/f has D at 0. Not clipped: near 0 it may be negative. Of more than MOST rows,
    MOST are drawn first. Raises ValueError below eight rows.
    """
    if min(len(x), len(y)) < 8:
        raise ValueError(f"an extrapolation needs at least 8 images in each set, got {min(len(x), len(y))}")
    random = np.random.default_rng(seed)
    x, y = (FeatureSet.of(z).drawn(MOST, random) for z in (x, y))
    inverse, values = [1.0], [frechet_distance_features(x, y)]
    for ratio in INVERSE_FRACTIONS:
        for _ in range(draws):
            parts = [z.take(random.choice(len(z), round(len(z) / ratio), replace=False)) for z in (x, y)]
            inverse.append(ratio)
            values.append(frechet_distance_features(*parts))
    # The whole sets are one draw, but without the scatter of drawing: they weigh as much as all draws of a fraction.
    weights = np.sqrt([float(draws)] + [1.0] * (len(values) - 1))
    design = np.stack([np.ones(len(values)), np.array(inverse)], axis=1)
    solution, *_ = np.linalg.lstsq(design * weights[:, None], np.array(values) * weights, rcond=None)
    residuals = (np.array(values) - design @ solution) * weights
    scatter = float(residuals @ residuals) / (len(values) - 2)
    covariance = scatter * np.linalg.inv((design * weights[:, None]).T @ (design * weights[:, None]))
    spread = np.array(values) * weights
    total = float(np.sum((spread - weights * np.average(values, weights=weights**2)) ** 2))
    fit = 1 - float(residuals @ residuals) / total if total > 0 else 1.0
    smallest = round(min(len(x), len(y)) / INVERSE_FRACTIONS[-1])
    return Extrapolation(float(solution[0]), float(np.sqrt(covariance[0, 0])), fit, smallest > x.dimension)


@dataclass(frozen=True)
class Halves:
    """``crossed``: images of one half against the counterfactuals of the other, mean over splits; ``own``: images of
    one half against their own counterfactuals, at the same N. ``own`` far below ``crossed`` says how much of a distance
    between images and their edits is that they are the same images."""

    crossed: float
    own: float
    n: int


def split_halves(images: Features, counterfactuals: Features, splits: int = 4, seed: int = 0) -> Halves:
    """Split-halves distance (Jeanneret 2023, there "sFID") of features [N, d] of images and, row by row, their
    counterfactuals.

    Of more than MOST images, MOST are drawn first. Raises ValueError below eight rows or for unequal lengths.
    """
    images, counterfactuals = FeatureSet.of(images), FeatureSet.of(counterfactuals)
    if len(images) != len(counterfactuals) or images.dimension != counterfactuals.dimension or len(images) < 8:
        raise ValueError(
            f"images and counterfactuals are [N, d] of one shape with N >= 8, got {len(images)} and "
            f"{len(counterfactuals)} rows of "
            f"{images.dimension} and {counterfactuals.dimension}"
        )
    random = np.random.default_rng(seed)
    if len(images) > MOST:
        chosen = np.sort(random.choice(len(images), MOST, replace=False))
        images, counterfactuals = images.take(chosen), counterfactuals.take(chosen)
    n = len(images) // 2
    crossed, own = [], []
    for _ in range(splits):
        order = random.permutation(len(images))
        first, second = order[:n], order[n : 2 * n]
        crossed += [
            frechet_distance_features(images.take(a), counterfactuals.take(b))
            for a, b in ((first, second), (second, first))
        ]
        own += [frechet_distance_features(images.take(a), counterfactuals.take(a)) for a in (first, second)]
    return Halves(float(np.mean(crossed)), float(np.mean(own)), n)


def conditional(groups: Mapping[str, tuple[Features, Features]]) -> float:
    """Mean distance within each condition (class or prompt), weighted by the rows of the second set: what a pooled
    distance hides when a generator makes the right mixture of the wrong images. Raises ValueError without a group, or
    for one with fewer than two rows."""
    if not groups:
        raise ValueError("no condition to compare within")
    values = [frechet_distance_features(x, y) for x, y in groups.values()]
    return float(np.average(values, weights=[len(y) for _, y in groups.values()]))
