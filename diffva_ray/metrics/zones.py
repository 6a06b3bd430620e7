"""Brixia zones (Borghesi & Maroldi 2020) as localization truth: readers' scores of six lung zones, 0 to 3 each.

A, B, C are the patient's right lung (the left half of the image) from top to bottom, D, E, F the left one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

ZONES = ("A", "B", "C", "D", "E", "F")


def zone_masks(lungs: NDArray[np.bool_] | None, size: int) -> NDArray[np.bool_]:
    """The six zones: thirds of each lung's height, with the lungs divided at the middle of their whole width.

    Borghesi and Maroldi divide lungs at the aortic arch and the pulmonary veins, which no mask shows; thirds replace
    them.

    Args:
        lungs: Lung mask, bool [size, size]. Without it, or if it is empty: the image's middle (15 to 85 % of the
            height, 10 to 90 % of the width).
        size: Side of the image.

    Returns:
        Masks of the zones A to F, bool [6, size, size].

    Raises:
        ValueError: If the mask has another shape.
    """
    if lungs is not None and lungs.shape != (size, size):
        raise ValueError(f"lungs are [{size}, {size}], got {lungs.shape}")
    if lungs is None or not lungs.any():
        lungs = np.zeros((size, size), bool)
        lungs[round(0.15 * size) : round(0.85 * size), round(0.1 * size) : round(0.9 * size)] = True
    columns = np.flatnonzero(lungs.any(axis=0))
    middle = (columns[0] + columns[-1] + 1) // 2
    zones = np.zeros((6, size, size), bool)
    for side, part in enumerate((slice(None, middle), slice(middle, None))):
        lung = np.zeros_like(lungs)
        lung[:, part] = lungs[:, part]
        rows = np.flatnonzero(lung.any(axis=1))
        if not len(rows):
            continue
        cuts = np.linspace(rows[0], rows[-1] + 1, 4).round().astype(int)
        for third in range(3):
            zones[3 * side + third, cuts[third] : cuts[third + 1]] = lung[cuts[third] : cuts[third + 1]]
    return zones


def zone_energy(saliency: NDArray[np.float32], zones: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mean saliency in each zone.

    Args:
        saliency: Map [H, W].
        zones: Masks of the zones, bool [6, H, W].

    Returns:
        Means [6], in the map's range; NaN for an empty zone.

    Raises:
        ValueError: If the shapes differ.
    """
    if zones.shape[1:] != saliency.shape:
        raise ValueError(f"saliency is [H, W] and zones are [6, H, W], got {saliency.shape} and {zones.shape}")
    areas = zones.sum(axis=(1, 2))
    sums = (zones * saliency.astype(np.float64)).sum(axis=(1, 2))
    return np.where(areas > 0, sums / np.maximum(areas, 1), np.nan)


@dataclass(frozen=True)
class ZoneAgreement:
    """Spearman's correlations of map energy and readers' scores, in [-1, 1]."""

    pooled: float  # over all zones of all images
    interval: tuple[float, float]  # 95 % interval of ``pooled``, by a bootstrap over images
    within: float  # mean of the correlations within single images, which do not depend on an image's overall severity
    n: int  # images
    n_within: int  # images whose zones differ, over which ``within`` is a mean


def zone_agreement(
    energies: NDArray[np.floating], scores: NDArray[np.floating], draws: int = 1000, seed: int = 0
) -> ZoneAgreement:
    """Agreement of map energies with readers' scores; zones that are NaN in either are left out.

    Args:
        energies: Mean saliency [N, 6] in the zones of N images.
        scores: Mean of the readers' scores [N, 6], 0 to 3.
        draws: Number of bootstrap samples.
        seed: Seed of the bootstrap.

    Returns:
        Correlations over all zones and within images.

    Raises:
        ValueError: If the shapes differ, or there is no image.
    """
    if energies.shape != scores.shape or energies.ndim != 2 or not len(energies):
        raise ValueError(f"energies and scores are [N, 6], got {energies.shape} and {scores.shape}")
    # Correlation over all zones, with a bootstrap over images.
    random = np.random.default_rng(seed)
    samples = [_spearman(energies[rows].ravel(), scores[rows].ravel())
             for rows in random.integers(len(scores), size=(draws, len(scores)))]  # fmt: skip
    valid = [value for value in samples if not np.isnan(value)]
    low, high = np.percentile(valid, [2.5, 97.5]) if len(valid) > draws // 2 and len(scores) > 1 else (np.nan, np.nan)

    # Correlation within each image.
    images = [_spearman(*pair) for pair in zip(energies, scores)]
    ranked = [value for value in images if not np.isnan(value)]
    within = float(np.mean(ranked)) if ranked else float("nan")
    pooled = _spearman(energies.ravel(), scores.ravel())
    return ZoneAgreement(pooled, (float(low), float(high)), within, len(scores), len(ranked))


def _spearman(x: NDArray[np.floating], y: NDArray[np.floating]) -> float:
    """Pearson's correlation of the ranks, ties shared; NaN where either is constant."""
    valid = ~(np.isnan(x) | np.isnan(y))
    if valid.sum() < 3 or np.ptp(x[valid]) == 0 or np.ptp(y[valid]) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(x[valid]), rankdata(y[valid]))[0, 1])
