"""Kernel distance of two feature sets (Binkowski 2018), unbiased at any N: read it before FID below N = 2048."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from diffva_ray.metrics.feature_set import Features, FeatureSet


def kid(
    x: Features,
    y: Features,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Unbiased squared MMD of two feature sets under the kernel (x.y/d + 1)^3, with its standard error.

    As usual, the value is the mean over samples of min(subset_size, N1, N2) rows from each set, without replacement. If
    one sample holds both sets whole, it is that single estimate.

    The error covers the sampling of N1 and N2 independent images (a delete-one jackknife, each row's effect averaged
    over the samples that contain it) and of the subsets; the deviation over subsets, which others report, covers
    neither. It is too large for a set against its own counterfactuals, because pairs are alike.

    Args:
        x: Features [N1, d].
        y: Features [N2, d].
        subsets: Number of samples.
        subset_size: Rows of each sample, at most.
        seed: Seed of the samples.

    Returns:
        Value and standard error, without unit (others report them times 1000); the value may be negative near 0.

    Raises:
        ValueError: If there are fewer than three rows in a set or two subsets, or the dimensions differ.

    Examples:
        >>> random = np.random.default_rng(0)
        >>> x, y = random.normal(size=(200, 4)), random.normal(size=(200, 4))
        >>> value, error = kid(x, y + 1)
        >>> value > 3 * error, abs(kid(x, y)[0]) < 3 * kid(x, y)[1]
        (True, True)
    """
    sets = [FeatureSet.of(x), FeatureSet.of(y)]
    if sets[0].dimension != sets[1].dimension:
        raise ValueError(f"features are [N, d] with one d, got {sets[0].dimension} and {sets[1].dimension}")
    size = min(subset_size, len(x), len(y))
    if size < 3 or subsets < 2:
        raise ValueError(f"KID needs at least 3 images in each set and 2 subsets, got {size} and {subsets}")
    if len(x) == len(y) == size:
        value, effects = _estimate(*(z.load() for z in sets))
        return value, float(np.sqrt(sum(effect.var() / (size - 1) for effect in effects)))

    # Estimate on samples, and add up the effects of the rows in them.
    random = np.random.default_rng(seed)
    values = np.empty(subsets)
    totals, counts = ([np.zeros(len(z)) for z in sets] for _ in range(2))
    for draw in range(subsets):
        rows = [random.choice(len(z), size, replace=False) for z in sets]
        values[draw], effects = _estimate(*(z.take(chosen).load() for z, chosen in zip(sets, rows)))
        for total, count, chosen, effect in zip(totals, counts, rows, effects):
            total[chosen] += effect
            count[chosen] += 1
    # Law of total variance: given the images, the mean scatters around the full U-statistic, which scatters as 1/N.
    variance = values.var(ddof=1) / subsets
    for total, count in zip(totals, counts):
        variance += (total[count > 0] / count[count > 0]).var() / (len(count) - 1)
    return float(values.mean()), float(np.sqrt(variance))


def _estimate(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, list[NDArray[np.float64]]]:
    """Unbiased MMD^2 of two sets, and the centred effects of the rows of x and of y; their variance over N - 1 is the
    jackknife's."""
    m, n = len(x), len(y)
    xx, yy, xy = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    np.fill_diagonal(xx, 0)
    np.fill_diagonal(yy, 0)
    value = xx.sum() / (m * (m - 1)) + yy.sum() / (n * (n - 1)) - 2 * xy.mean()
    # N - 1 times MMD^2 without row i, up to a constant: row i leaves its own block as a row and as a column.
    effects = [
        2 * xy.mean(axis=1) - 2 * xx.sum(axis=1) / (m - 2),
        2 * xy.mean(axis=0) - 2 * yy.sum(axis=1) / (n - 2),
    ]
    return float(value), [effect - effect.mean() for effect in effects]


def _kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    values: NDArray[np.float64] = (x @ y.T / x.shape[1] + 1) ** 3
    return values
