"""Frechet distance of two feature sets (Heusel 2017), with moments that merge, an interval and an N-matched value.

The distance itself is the same whatever network the features come from; it is called FID only for pytorch-fid's
Inception. It is biased upwards at finite N, and the more so the fewer rows: never compare values at unequal N.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.stats import t as student

from diffva_ray.metrics.feature_set import Features, FeatureSet

SMALL = 2048  # rows of a set, below which the distance is mostly its own bias and KID is read first
ROW_BY_ROW = 20_000  # rows up to which a large set is held against one of fewer rows than dimensions


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean [d] and centred sum of outer products [d, d] of n feature vectors, in float64.

    Raw sums of squares would cancel; these merge without loss, whatever the grouping (to rounding: fix the order for
    bit-equality).
    """

    n: int
    mean: NDArray[np.float64]
    scatter: NDArray[np.float64]

    @classmethod
    def of(cls, features: Features) -> Moments:
        """Moments of ``features`` [N, d], a block of rows at a time; N may be 0 (a shard without a good record)."""
        x = FeatureSet.of(features)
        found = cls(0, np.zeros(x.dimension), np.zeros((x.dimension, x.dimension)))
        for rows in x.blocks():
            mean = rows.mean(axis=0)
            centred = rows - mean
            block = cls(len(rows), mean, centred.T @ centred)
            found = block if found.n == 0 else found.merge(block)
        return found

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
        _enough(self.n, 2)
        return self.scatter / (self.n - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """||m1 - m2||^2 + tr(S1 + S2 - 2 (S1 S2)^1/2), at least 0, in squared units of the features.

    tr (S1 S2)^1/2 is the sum of the square roots of the eigenvalues of S1^1/2 S2 S1^1/2: symmetric, so neither an
    imaginary part nor ``scipy.linalg.sqrtm`` (mseitzer/pytorch-fid#117). Raises ValueError below two rows and for
    moments of unequal dimension.

        >>> x = np.random.default_rng(0).normal(size=(500, 4))
        >>> round(frechet_distance(Moments.of(x), Moments.of(x + 0.5)), 6)
        1.0
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and {len(b.mean)} dimensions cannot be compared")
    if b.n < a.n:
        a, b = b, a  # the root is taken of the set of lower rank, where zero eigenvalues would become rounding noise
    s1, s2 = a.covariance, b.covariance
    values, vectors = scipy.linalg.eigh(s1)
    kept = values > values[-1] * len(values) * np.finfo(float).eps
    root = vectors[:, kept] * np.sqrt(values[kept])
    product = scipy.linalg.eigvalsh(root.T @ s2 @ root) if kept.any() else np.zeros(0)
    return _distance(a.mean - b.mean, np.trace(s1) + np.trace(s2), np.sqrt(np.clip(product, 0, None)).sum())


def frechet_distance_features(x: Features, y: Features) -> float:
    """Frechet distance of features [N1, d] and [N2, d], at least 0, in squared units of the features.

    With fewer rows than dimensions the covariances are singular; then tr (S1 S2)^1/2 is taken as the nuclear norm of
    A B^T (A, B: centred features over sqrt(n - 1)), which is exact at rank n; with more than ROW_BY_ROW rows in the
    larger set, as the root of A (B^T B) A^T. Raises ValueError below two rows and for unequal d.
    """
    first, second = _two(x, y, 2)
    if min(len(first), len(second)) >= first.dimension:
        return frechet_distance(Moments.of(first), Moments.of(second))
    small, large = sorted((first, second), key=len)
    mean, a = _scaled(small)
    if len(large) > ROW_BY_ROW:
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
    """95% interval (low, high) of the Frechet distance of features [N1, d] and [N2, d], by deleting groups of rows.

    Each set is cut at random into ``groups`` parts (at most one per row), and part g leaves both sets at once. The
    interval is Student's, about the jackknife's bias-corrected value, clipped at 0: the plain value is biased upwards
    and may lie above it, which tells how much of that value is N. The correction removes the bias of order 1/N; with
    fewer rows than dimensions some of it stays. A bootstrap is no alternative: repeated rows add to the bias.

    ``paired``: row i of both sets belongs to one image (an image and its counterfactual), so both sets are cut alike
    and a image leaves with its counterfactual; then N1 = N2. Raises ValueError below four rows, or when paired sets
    differ in length.
    """
    x, y = _two(x, y, 4)
    if paired and len(x) != len(y):
        raise ValueError(f"paired sets have one row per image each, got {len(x)} and {len(y)}")
    groups = min(groups, len(x), len(y))
    if groups < 2:
        raise ValueError(f"a jackknife needs at least 2 groups, got {groups}")
    random = np.random.default_rng(seed)
    of_x = random.permutation(np.arange(len(x)) % groups)
    of_y = of_x if paired else random.permutation(np.arange(len(y)) % groups)
    if min(len(x), len(y)) * (groups - 1) // groups >= x.dimension:
        # Moments merge, so each set is gone over once and what is left without a group is put together from the others.
        parts_x = [Moments.of(x.take(of_x == g)) for g in range(groups)]
        parts_y = [Moments.of(y.take(of_y == g)) for g in range(groups)]
        whole = frechet_distance(reduce(Moments.merge, parts_x), reduce(Moments.merge, parts_y))
        without = [
            frechet_distance(*(reduce(Moments.merge, parts[:g] + parts[g + 1 :]) for parts in (parts_x, parts_y)))
            for g in range(groups)
        ]
    else:  # fewer rows than dimensions: a distance from the rows costs less than one from [d, d] moments
        whole = frechet_distance_features(x, y)
        without = [frechet_distance_features(x.take(of_x != g), y.take(of_y != g)) for g in range(groups)]
    # Efron & Tibshirani 1993, chapter 11: bias-corrected value and standard error of a jackknife over groups.
    centre = groups * whole - (groups - 1) * np.mean(without)
    error = np.sqrt((groups - 1) * np.var(without))
    reach = student.ppf(0.975, groups - 1) * error
    return float(max(centre - reach, 0.0)), float(max(centre + reach, 0.0))


def matched(x: Features, y: Features, draws: int = 5, seed: int = 0, n: int | None = None) -> tuple[float, float]:
    """Mean and standard deviation of the Frechet distance when both sets are drawn down to the same ``n`` rows.

    ``n`` is by default that of the smaller set, which then takes part whole; give the smallest N of a table to make its
    rows comparable. Rows are drawn without replacement, ``draws`` times; the deviation is that of the draws (0 when
    both sets have n rows), not a sampling error. Raises ValueError for n below 2 or above the smaller set.
    """
    x, y = _two(x, y, 2)
    smaller = min(len(x), len(y))
    n = smaller if n is None else n
    _enough(n, 2)
    if n > smaller:
        raise ValueError(f"sets of {len(x)} and {len(y)} features cannot be drawn down to {n}")
    if len(x) == len(y) == n:
        return frechet_distance_features(x, y), 0.0
    if draws < 2:
        raise ValueError(f"a deviation needs at least 2 draws, got {draws}")
    random = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        rows = [np.sort(random.choice(len(z), n, replace=False)) for z in (x, y)]
        values.append(frechet_distance_features(x.take(rows[0]), y.take(rows[1])))
    return float(np.mean(values)), float(np.std(values, ddof=1))


def _distance(shift: NDArray[np.float64], traces: float, root: float) -> float:
    return max(float(shift @ shift + traces - 2 * root), 0.0)


def _two(x: Features, y: Features, least: int) -> tuple[FeatureSet, FeatureSet]:
    x, y = FeatureSet.of(x), FeatureSet.of(y)
    if x.dimension != y.dimension:
        raise ValueError(f"features of {x.dimension} and {y.dimension} dimensions cannot be compared")
    _enough(min(len(x), len(y)), least)
    return x, y


def _enough(n: int, least: int) -> None:
    if n < least:
        raise ValueError(f"a Frechet distance needs at least {least} images in each set here, got {n}")
