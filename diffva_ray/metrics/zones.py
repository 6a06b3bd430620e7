"""Brixia zones (Borghesi & Maroldi 2020) as localisation truth: readers' scores of six lung zones, 0 to 3 each.

A, B, C are the patient's right lung (the left half of the image) from top to bottom, D, E, F the left one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

ZONES = ("A", "B", "C", "D", "E", "F")


def zone_masks(lungs: NDArray[np.bool_] | None, size: int) -> NDArray[np.bool_]:
    """The six zones bool [6, size, size]: thirds of each lung's height, the lungs [size, size] parted at the middle of
    their whole width. Without lungs: thirds of the image's middle (15 to 85 % of the height, 10 to 90 % of the width).
    Borghesi and Maroldi part lungs at the aortic arch and the pulmonary veins, which no mask shows: thirds stand in for
    that. Raises ValueError for lungs of another shape."""
    if lungs is not None and lungs.shape != (size, size):
        raise ValueError(f"lungs are [{size}, {size}], got {lungs.shape}")
    if lungs is None or not lungs.any():
        lungs = np.zeros((size, size), bool)
        lungs[round(0.15 * size) : round(0.85 * size), round(0.1 * size) : round(0.9 * size)] = True
    columns = np.flatnonzero(lungs.any(axis=0))
    middle = (columns[0] + columns[-1] + 1) // 2
    found = np.zeros((6, size, size), bool)
    for side, part in enumerate((slice(None, middle), slice(middle, None))):
        lung = np.zeros_like(lungs)
        lung[:, part] = lungs[:, part]
        rows = np.flatnonzero(lung.any(axis=1))
        if not len(rows):
            continue
        cuts = np.linspace(rows[0], rows[-1] + 1, 4).round().astype(int)
        for third in range(3):
            found[3 * side + third, cuts[third] : cuts[third + 1]] = lung[cuts[third] : cuts[third + 1]]
    return found


def zone_energy(saliency: NDArray[np.float32], zones: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mean saliency [6] of a map [H, W] in each zone [6, H, W], in the map's own range; NaN in an empty one. Raises
    ValueError for unequal shapes."""
    if zones.shape[1:] != saliency.shape:
        raise ValueError(f"saliency is [H, W] and zones are [6, H, W], got {saliency.shape} and {zones.shape}")
    areas = zones.sum(axis=(1, 2))
    sums = (zones * saliency.astype(np.float64)).sum(axis=(1, 2))
    return np.where(areas > 0, sums / np.maximum(areas, 1), np.nan)


@dataclass(frozen=True)
class ZoneAgreement:
    """Spearman's correlations of map energy and readers' scores, in [-1, 1]. ``pooled``: over all zones of all images,
    ``interval``: 95 %, bootstrap over images; ``within``: mean over the images whose zones differ of the correlation of
    their six zones, which no image's overall severity can make; ``n_within``: those images."""

    pooled: float
    interval: tuple[float, float]
    within: float
    n: int
    n_within: int


def zone_agreement(
    energies: NDArray[np.floating], scores: NDArray[np.floating], draws: int = 1000, seed: int = 0
) -> ZoneAgreement:
    """Agreement of map energies [N, 6] with readers' scores [N, 6] (mean of the readers, 0 to 3); zones that are NaN in
    either are left out. Raises ValueError for unequal shapes or without an image."""
    if energies.shape != scores.shape or energies.ndim != 2 or not len(energies):
        raise ValueError(f"energies and scores are [N, 6], got {energies.shape} and {scores.shape}")
    random = np.random.default_rng(seed)
    drawn = [_spearman(energies[rows].ravel(), scores[rows].ravel())
             for rows in random.integers(len(scores), size=(draws, len(scores)))]  # fmt: skip
    known = [value for value in drawn if not np.isnan(value)]
    low, high = np.percentile(known, [2.5, 97.5]) if len(known) > draws // 2 and len(scores) > 1 else (np.nan, np.nan)
    images = [_spearman(*pair) for pair in zip(energies, scores)]
    ranked = [value for value in images if not np.isnan(value)]
    within = float(np.mean(ranked)) if ranked else float("nan")
    pooled = _spearman(energies.ravel(), scores.ravel())
    return ZoneAgreement(pooled, (float(low), float(high)), within, len(scores), len(ranked))


def _spearman(x: NDArray[np.floating], y: NDArray[np.floating]) -> float:
    """Pearson's correlation of the ranks, ties shared; NaN where either is constant."""
    known = ~(np.isnan(x) | np.isnan(y))
    if known.sum() < 3 or np.ptp(x[known]) == 0 or np.ptp(y[known]) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(x[known]), rankdata(y[known]))[0, 1])
