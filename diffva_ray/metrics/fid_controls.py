"""Controls of a Frechet distance: its bias of order 1/N (FID-infinity), the likeness of an image and its own edit
(split halves), and differences between classes (distance within each condition)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from diffva_ray.metrics.feature_set import Features, FeatureSet
from diffva_ray.metrics.fid import frechet_distance_features

INVERSE_FRACTIONS = (1.25, 1.5, 1.75, 2.0)  # both sets are sampled down to 80 % ... 50 %
MAX_ROWS = 50_000  # rows of a set, as in Chong & Forsyth; with more, the bias is below a table's precision


@dataclass(frozen=True)
class Extrapolation:
    """A distance extrapolated to infinite N."""

    value: float  # the distance, in squared units of the features
    error: float  # standard error of the fitted intercept, which is not a sampling error
    r_squared: float  # of the fitted line
    # Whether the smallest sample has more rows than dimensions; otherwise the bias is not proportional to 1/N and the
    # value stays too high.
    trusted: bool


def infinity(x: Features, y: Features, draws: int = 4, seed: int = 0) -> Extrapolation:
    """FID-infinity (Chong & Forsyth 2020): the Frechet distance of features [N1, d] and [N2, d] extrapolated to
    infinite N; not clipped, may be negative near 0. Raises ValueError for fewer than eight rows in a set.

    Both sets are sampled ``draws`` times, without replacement, down to the same fractions f. To first order the
    distance is D + c/f (c = a/N1 + b/N2), so a line over 1/f has D at 0. Larger sets are first sampled down to
    MAX_ROWS."""
    if min(len(x), len(y)) < 8:
        raise ValueError(f"an extrapolation needs at least 8 images in each set, got {min(len(x), len(y))}")
    # Distances of the whole sets and of samples.
    random = np.random.default_rng(seed)
    x, y = (FeatureSet.of(z).sampled(MAX_ROWS, random) for z in (x, y))
    inverse, values = [1.0], [frechet_distance_features(x, y)]
    for ratio in INVERSE_FRACTIONS:
        for _ in range(draws):
            parts = [z.take(random.choice(len(z), round(len(z) / ratio), replace=False)) for z in (x, y)]
            inverse.append(ratio)
            values.append(frechet_distance_features(*parts))
    # Weighted fit: the whole sets have no sampling scatter, so they weigh as much as all samples of a fraction.
    weights = np.sqrt([float(draws)] + [1.0] * (len(values) - 1))
    design = np.stack([np.ones(len(values)), np.array(inverse)], axis=1)
    solution, *_ = np.linalg.lstsq(design * weights[:, None], np.array(values) * weights, rcond=None)
    # Error of the intercept, and R squared.
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
    """Distances between halves; ``own`` far below ``crossed`` shows that images and edits are close because each edit
    resembles its own image."""

    crossed: float  # images of one half against counterfactuals of the other, mean over splits
    own: float  # images of one half against their own counterfactuals, at the same N
    n: int  # rows of a half


def split_halves(images: Features, counterfactuals: Features, splits: int = 4, seed: int = 0) -> Halves:
    """Split-halves distance (Jeanneret 2023, there "sFID") of features of images [N, d] and of their counterfactuals
    [N, d], row by row: means over ``splits``. Larger sets are first sampled down to MAX_ROWS. Raises ValueError for
    fewer than eight rows, or another shape."""
    images, counterfactuals = FeatureSet.of(images), FeatureSet.of(counterfactuals)
    if len(images) != len(counterfactuals) or images.dimension != counterfactuals.dimension or len(images) < 8:
        raise ValueError(
            f"images and counterfactuals are [N, d] of one shape with N >= 8, got {len(images)} and "
            f"{len(counterfactuals)} rows of {images.dimension} and {counterfactuals.dimension}"
        )
    random = np.random.default_rng(seed)
    if len(images) > MAX_ROWS:
        chosen = np.sort(random.choice(len(images), MAX_ROWS, replace=False))
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
    """Mean Frechet distance within each condition (class or prompt) of ``groups``, weighted by the rows of the second
    set. Raises ValueError without a condition, or for one with fewer than two rows.

    A pooled distance hides that a generator makes the right mixture of wrong images."""
    if not groups:
        raise ValueError("no condition to compare within")
    values = [frechet_distance_features(x, y) for x, y in groups.values()]
    return float(np.average(values, weights=[len(y) for _, y in groups.values()]))
