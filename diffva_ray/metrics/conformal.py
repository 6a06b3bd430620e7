"""A threshold for maps with a guarantee on healthy images: conformal risk control (Angelopoulos et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def attributed(saliency: NDArray[np.float32], region: NDArray[np.bool_] | None, threshold: float) -> float:
    """Share of the pixels of the region (None: of the image) with ``saliency`` [H, W] above the threshold. Raises
    ValueError for a region without a pixel."""
    return float((_inside(saliency, region) > threshold).mean())


def conformal_threshold(
    maps: Sequence[NDArray[np.float32]], regions: Sequence[NDArray[np.bool_] | None], level: float = 0.05
) -> float:
    """The smallest threshold at which at most ``level`` of a new healthy image's pixels is attributed, in expectation.

    ``maps`` and ``regions`` [H, W] are of n healthy images that are exchangeable with the new one (not those a model or
    a threshold was made with). The loss of an image is its share of attributed pixels, at most 1, so the guarantee
    holds where the mean over the n images is at most ``level - (1 - level) / n`` (their equation 4). Raises ValueError
    where n is too small for that to be anything: n < (1 - level) / level, and for a region without a pixel.
    """
    n = len(maps)
    allowed = level - (1 - level) / n if n else -1.0
    if allowed < 0:
        raise ValueError(
            f"{n} healthy images are too few for a level of {level:g}; {int(np.ceil(1 / level)) - 1} would do"
        )
    inside = [_inside(saliency, region) for saliency, region in zip(maps, regions, strict=True)]
    values = np.concatenate(inside)
    weights = np.concatenate([np.full(len(part), 1 / len(part) / n) for part in inside])
    order = np.argsort(-values, kind="stable")
    taken = np.cumsum(weights[order])  # mean share attributed, were the threshold just below the k highest values
    beyond = int(np.searchsorted(taken, allowed, side="right"))  # the first value that must not be attributed
    return float(values[order[min(beyond, len(values) - 1)]])


def _inside(saliency: NDArray[np.float32], region: NDArray[np.bool_] | None) -> NDArray[np.float32]:
    """Values [n] of a map in its region, at least one."""
    values = saliency.ravel() if region is None else saliency[region]
    if not values.size:
        raise ValueError("a region without a pixel has no share; leave out images whose lung mask is empty")
    return values
