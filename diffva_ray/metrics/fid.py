"""Frechet distance of two feature sets (Heusel 2017), with mergeable moments, an interval and an N-matched value.

It is called FID only in features of pytorch-fid's Inception. At finite N it is biased upwards, the more the fewer rows:
never compare values at unequal N.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.stats import t as student

from diffva_ray.metrics.feature_set import Features, FeatureSet

SMALL = 2048  # rows of a set below which the distance is mostly bias and KID should be read first
MAX_DENSE_ROWS = 20_000  # rows of the larger set up to which it is multiplied row by row with a small one


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of n feature vectors in float64, mergeable in any grouping.

    Merging is exact up to rounding (fix the order for bit-equality); raw sums of squares would cancel.
    """

    n: int  # feature vectors
    mean: NDArray[np.float64]  # [d]
    scatter: NDArray[np.float64]  # centred sum of outer products [d, d]

    @classmethod
    def of(cls, features: Features) -> Moments:
        """Moments of ``features`` [N, d], read in blocks of rows; N may be 0 (a shard without a good record)."""
        x = FeatureSet.of(features)
        total = cls(0, np.zeros(x.dimension), np.zeros((x.dimension, x.dimension)))
        for rows in x.blocks():
            mean = rows.mean(axis=0)
            centred = rows - mean
            block = cls(len(rows), mean, centred.T @ centred)
            total = block if total.n == 0 else total.merge(block)
        return total

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets together (Chan, Golub & LeVeque 1979). Raises ValueError for another dimension."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"features of {len(self.mean)} and {len(other.mean)} dimensions cannot be merged")
        n = self.n + other.n
        if n == 0:
            return self
        delta = other.mean - self.mean
        return Moments(
            n,
            self.mean + delta * (other.n / n),
            self.scatter + other.scatter + np.outer(delta, delta) * (self.n * other.n / n),
        )

    @property
    def covariance(self) -> NDArray[np.float64]:
        """Sample covariance [d, d] (divisor n - 1). Raises ValueError below two rows."""
        _check_count(self.n, 2)
        return self.scatter / (self.n - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """||m1 - m2||^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) of two Gaussians.

    tr (S1 S2)^1/2 is computed as the sum of the square roots of the eigenvalues of S1^1/2 S2 S1^1/2. That matrix is
    symmetric, so there is no imaginary part and no need of ``scipy.linalg.sqrtm`` (mseitzer/pytorch-fid#117).

    Args:
        a: Moments of one set, with at least two rows.
        b: Moments of the other, of the same dimension.

    Returns:
        The distance, at least 0, in squared units of the features.

    Raises:
        ValueError: If there are fewer than two rows, or the dimensions differ.

    Examples:
        >>> x = np.random.default_rng(0).normal(size=(500, 4))
        >>> round(frechet_distance(Moments.of(x), Moments.of(x + 0.5)), 6)
        1.0
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and {len(b.mean)} dimensions cannot be compared")
    if b.n < a.n:
        a, b = b, a  # take the root of the set of lower rank, whose zero eigenvalues are dropped
    s1, s2 = a.covariance, b.covariance
    values, vectors = scipy.linalg.eigh(s1)
    kept = values > values[-1] * len(values) * np.finfo(float).eps
    root = vectors[:, kept] * np.sqrt(values[kept])
    product = scipy.linalg.eigvalsh(root.T @ s2 @ root) if kept.any() else np.zeros(0)
    return _distance(a.mean - b.mean, np.trace(s1) + np.trace(s2), np.sqrt(np.clip(product, 0, None)).sum())


def frechet_distance_features(x: Features, y: Features) -> float:
    """Frechet distance of two feature sets, also with fewer rows than dimensions.

    Then the covariances are singular and tr (S1 S2)^1/2 is the nuclear norm of A B^T (A, B: centred features over
    sqrt(n - 1)), which is exact at rank n. With more than MAX_DENSE_ROWS rows in the larger set it is computed as the
    root of A (B^T B) A^T.

    Args:
        x: Features [N1, d].
        y: Features [N2, d].

    Returns:
        The distance, at least 0, in squared units of the features.

    Raises:
        ValueError: If there are fewer than two rows in a set, or the dimensions differ.
    """
    first, second = _check_sets(x, y, 2)
    if min(len(first), len(second)) >= first.dimension:
        return frechet_distance(Moments.of(first), Moments.of(second))
    small, large = sorted((first, second), key=len)
    mean, a = _scaled(small)
    if len(large) > MAX_DENSE_ROWS:
        other = Moments.of(large)
        root = np.sqrt(np.clip(scipy.linalg.eigvalsh(a @ other.covariance @ a.T), 0, None)).sum()
        return _distance(mean - other.mean, np.sum(a * a) + np.trace(other.covariance), root)
    centre, b = _scaled(large)
    return _distance(mean - centre, np.sum(a * a) + np.sum(b * b), scipy.linalg.svdvals(a @ b.T).sum())


def _scaled(features: FeatureSet) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean [d], and the centred rows over sqrt(n - 1) [N, d]."""
    rows = features.load()
    mean = rows.mean(axis=0)
    return mean, (rows - mean) / np.sqrt(len(rows) - 1)


def delete_group_jackknife(
    x: Features, y: Features, groups: int = 10, seed: int = 0, paired: bool = False
) -> tuple[float, float]:
    """95% interval of the Frechet distance by deleting groups of rows.

    Each set is cut at random into groups, and group g leaves both sets at once. The interval is Student's, around the
    jackknife's bias-corrected value. The plain value is biased upwards and may lie above the interval, which shows how
    much of it is due to N. The correction removes the bias of order 1/N; with fewer rows than dimensions some stays. A
    bootstrap does not work here, because repeated rows add to the bias.

    Args:
        x: Features [N1, d].
        y: Features [N2, d].
        groups: Number of groups, at most one per row.
        seed: Seed of the grouping.
        paired: Whether row i of both sets belongs to one image (an image and its counterfactual). Both sets are then
            cut alike, so that an image leaves together with its counterfactual; N1 = N2.

    Returns:
        Low and high end, at least 0.

    Raises:
        ValueError: If there are fewer than four rows in a set, or paired sets differ in length.
    """
    x, y = _check_sets(x, y, 4)
    if paired and len(x) != len(y):
        raise ValueError(f"paired sets have one row per image each, got {len(x)} and {len(y)}")
    groups = min(groups, len(x), len(y))
    if groups < 2:
        raise ValueError(f"a jackknife needs at least 2 groups, got {groups}")
    # Distances of the whole sets, and without each group.
    random = np.random.default_rng(seed)
    of_x = random.permutation(np.arange(len(x)) % groups)
    of_y = of_x if paired else random.permutation(np.arange(len(y)) % groups)
    if min(len(x), len(y)) * (groups - 1) // groups >= x.dimension:
        # Moments merge, so each set is read once, and the set without a group is merged from the other groups.
        parts_x = [Moments.of(x.take(of_x == g)) for g in range(groups)]
        parts_y = [Moments.of(y.take(of_y == g)) for g in range(groups)]
        whole = frechet_distance(reduce(Moments.merge, parts_x), reduce(Moments.merge, parts_y))
        without = [
            frechet_distance(*(reduce(Moments.merge, parts[:g] + parts[g + 1 :]) for parts in (parts_x, parts_y)))
            for g in range(groups)
        ]
    else:  # with fewer rows than dimensions, rows are cheaper than [d, d] moments
        whole = frechet_distance_features(x, y)
        without = [frechet_distance_features(x.take(of_x != g), y.take(of_y != g)) for g in range(groups)]
    # Efron & Tibshirani 1993, chapter 11: bias-corrected value and standard error of a jackknife over groups.
    centre = groups * whole - (groups - 1) * np.mean(without)
    error = np.sqrt((groups - 1) * np.var(without))
    reach = student.ppf(0.975, groups - 1) * error
    return float(max(centre - reach, 0.0)), float(max(centre + reach, 0.0))


def matched(x: Features, y: Features, draws: int = 5, seed: int = 0, n: int | None = None) -> tuple[float, float]:
    """Frechet distance with both sets sampled down to the same number of rows, without replacement.

    Args:
        x: Features [N1, d].
        y: Features [N2, d].
        draws: Number of samples.
        seed: Seed of the samples.
        n: Rows of each sample; by default those of the smaller set, which is then used whole. Give the smallest N of a
            table to make its rows comparable.

    Returns:
        Mean and standard deviation over samples. The deviation is not a sampling error; it is 0 when both sets have n
        rows.

    Raises:
        ValueError: If n is below 2 or above the smaller set.
    """
    x, y = _check_sets(x, y, 2)
    smaller = min(len(x), len(y))
    n = smaller if n is None else n
    _check_count(n, 2)
    if n > smaller:
        raise ValueError(f"sets of {len(x)} and {len(y)} features cannot be sampled down to {n}")
    if len(x) == len(y) == n:
        return frechet_distance_features(x, y), 0.0
    if draws < 2:
        raise ValueError(f"a deviation needs at least 2 samples, got draws={draws}")
    random = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        rows = [np.sort(random.choice(len(z), n, replace=False)) for z in (x, y)]
        values.append(frechet_distance_features(x.take(rows[0]), y.take(rows[1])))
    return float(np.mean(values)), float(np.std(values, ddof=1))


def _distance(shift: NDArray[np.float64], traces: float, root: float) -> float:
    return max(float(shift @ shift + traces - 2 * root), 0.0)


def _check_sets(x: Features, y: Features, minimum: int) -> tuple[FeatureSet, FeatureSet]:
    x, y = FeatureSet.of(x), FeatureSet.of(y)
    if x.dimension != y.dimension:
        raise ValueError(f"features of {x.dimension} and {y.dimension} dimensions cannot be compared")
    _check_count(min(len(x), len(y)), minimum)
    return x, y


def _check_count(n: int, minimum: int) -> None:
    if n < minimum:
        raise ValueError(f"a Frechet distance needs at least {minimum} images in each set here, got {n}")
