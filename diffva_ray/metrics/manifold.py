"""Precision and recall (Kynkaanniemi 2019), density and coverage (Naeem 2020) of two feature sets.

A set's manifold is the union of balls around its rows; each reaches to the row's k-th neighbour in the same set.
Distances are Euclidean. Memory is one block of rows against a set, for any N.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffva_ray.metrics.feature_set import Features, FeatureSet

BLOCK = 1024  # rows per block of distances
MAX_ROWS = 5_000  # rows of a set that are compared; the work grows with the square


@dataclass(frozen=True)
class Manifold:
    """Fidelity and diversity of a generated set against a real one."""

    precision: float  # share of generated rows inside the real manifold (fidelity)
    recall: float  # share of real rows inside the generated manifold (diversity)
    density: float  # real balls around a generated row, over k; above 1 if generated rows prefer dense regions
    coverage: float  # share of real balls that hold a generated row
    n1: int  # real rows compared
    n2: int  # generated rows compared


def prdc(real: Features, generated: Features, k: int = 5, seed: int = 0) -> Manifold:
    """Precision, recall, density and coverage of features [N1, d] and [N2, d] as in the authors' ``prdc``: balls that
    reach to the ``k``-th neighbour, open; no row is its own neighbour. Raises ValueError for a set of ``k`` rows or
    fewer.

    Two samples of one distribution have precision and recall below 1, and the lower the fewer rows: compare at equal N.
    Larger sets are sampled down to MAX_ROWS."""
    sets = [FeatureSet.of(real), FeatureSet.of(generated)]
    if sets[0].dimension != sets[1].dimension:
        raise ValueError(f"features are [N, d] with one d, got {sets[0].dimension} and {sets[1].dimension}")
    if min(len(each) for each in sets) <= k:
        raise ValueError(f"{k} neighbours need more than {k} images in each set, got {len(sets[0])} and {len(sets[1])}")
    random = np.random.default_rng(seed)
    real, generated = (each.sampled(MAX_ROWS, random).load() for each in sets)
    real_radii, generated_radii = _radii(real, k), _radii(generated, k)
    generated_inside = real_inside = balls = balls_covered = 0
    for _, squares in _blocks(generated, real):
        inside = squares < real_radii
        generated_inside += int(inside.any(axis=1).sum())
        balls += int(inside.sum())
    for rows, squares in _blocks(real, generated):
        real_inside += int((squares < generated_radii).any(axis=1).sum())
        balls_covered += int((squares.min(axis=1) < real_radii[rows]).sum())
    n1, n2 = len(real), len(generated)
    return Manifold(generated_inside / n2, real_inside / n1, balls / (k * n2), balls_covered / n1, n1, n2)


def squared_distances(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared Euclidean distances [N1, N2] of rows [N1, d] and [N2, d], at least 0."""
    squares: NDArray[np.float64] = (x * x).sum(axis=1)[:, None] + (y * y).sum(axis=1) - 2 * x @ y.T
    return np.maximum(squares, 0)


def _radii(x: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Squared distance of each row to its k-th neighbour, not counting the row itself."""
    radii = np.empty(len(x))
    for rows, squares in _blocks(x, x):
        squares[np.arange(len(squares)), np.arange(rows.start, rows.start + len(squares))] = np.inf
        radii[rows] = np.partition(squares, k - 1, axis=1)[:, k - 1]
    return radii


def _blocks(x: NDArray[np.float64], y: NDArray[np.float64]) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Squared distances of blocks of rows of x to all rows of y."""
    for start in range(0, len(x), BLOCK):
        rows = slice(start, min(start + BLOCK, len(x)))
        yield rows, squared_distances(x[rows], y)
