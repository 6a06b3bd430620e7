"""Precision and recall (Kynkaanniemi 2019), density and coverage (Naeem 2020) of two feature sets.

A set's manifold is the union of balls about its rows, each reaching to the row's k-th neighbour in the same set.
Distances are Euclidean; memory is one block of rows against a set, whatever N is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffva_ray.metrics.feature_set import Features, FeatureSet

BLOCK = 1024  # rows at a time
MOST = 5_000  # rows of a set that are looked at: work grows with the square


@dataclass(frozen=True)
class Manifold:
    """``precision``: share of the second set inside the first's manifold (fidelity). ``recall``: share of the first
    inside the second's (diversity). ``density``: balls of the first about a row of the second, over k; above 1 where
    the second keeps to crowded places. ``coverage``: share of the first's balls that hold a row of the second.
    ``n1``, ``n2``: rows of each set that were looked at."""

    precision: float
    recall: float
    density: float
    coverage: float
    n1: int
    n2: int


def prdc(real: Features, generated: Features, k: int = 5, seed: int = 0) -> Manifold:
    """The four numbers of features [N1, d] and [N2, d]; neighbours are counted without the row itself and a ball is
    open, as in the authors' ``prdc``. Two samples of one distribution have precision and recall below 1, and the
    lower the fewer rows: compare at equal N. Of more than MOST rows of a set, MOST are drawn. Raises ValueError with
    ``k`` rows or fewer in a set."""
    sets = [FeatureSet.of(real), FeatureSet.of(generated)]
    if sets[0].dimension != sets[1].dimension:
        raise ValueError(f"features are [N, d] with one d, got {sets[0].dimension} and {sets[1].dimension}")
    if min(len(one) for one in sets) <= k:
        raise ValueError(f"{k} neighbours need more than {k} images in each set, got {len(sets[0])} and {len(sets[1])}")
    random = np.random.default_rng(seed)
    real, generated = (one.drawn(MOST, random).load() for one in sets)
    real_radii, generated_radii = _radii(real, k), _radii(generated, k)
    precise = recalled = balls = covered = 0
    for _, squares in _blocks(generated, real):
        inside = squares < real_radii
        precise += int(inside.any(axis=1).sum())
        balls += int(inside.sum())
    for rows, squares in _blocks(real, generated):
        recalled += int((squares < generated_radii).any(axis=1).sum())
        covered += int((squares.min(axis=1) < real_radii[rows]).sum())
    n1, n2 = len(real), len(generated)
    return Manifold(precise / n2, recalled / n1, balls / (k * n2), covered / n1, n1, n2)


def squared_distances(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared Euclidean distances [N1, N2] of rows [N1, d] and [N2, d], at least 0."""
    return np.maximum((x * x).sum(axis=1)[:, None] + (y * y).sum(axis=1) - 2 * x @ y.T, 0)


def _radii(x: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Squared distance of each row to its k-th neighbour, itself not counted."""
    radii = np.empty(len(x))
    for rows, squares in _blocks(x, x):
        squares[np.arange(len(squares)), np.arange(rows.start, rows.start + len(squares))] = np.inf
        radii[rows] = np.partition(squares, k - 1, axis=1)[:, k - 1]
    return radii


def _blocks(x: NDArray[np.float64], y: NDArray[np.float64]) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Squared distances of the rows of x, a block at a time, to all of y."""
    for start in range(0, len(x), BLOCK):
        rows = slice(start, min(start + BLOCK, len(x)))
        yield rows, squared_distances(x[rows], y)
