"""Map thresholds with a guarantee on healthy images, by conformal risk control (Angelopoulos et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def attributed(saliency: NDArray[np.float32], region: NDArray[np.bool_] | None, threshold: float) -> float:
    """Share of pixels that a threshold attributes to disease.

    Args:
        saliency: Map [H, W].
        region: Pixels to count, bool [H, W]; None for the whole image.
        threshold: A pixel is attributed if its saliency is above.

    Returns:
        Share of the region's pixels, in [0, 1].

    Raises:
        ValueError: If the region has no pixel.
    """
    return float((_inside(saliency, region) > threshold).mean())


def conformal_threshold(
    maps: Sequence[NDArray[np.float32]], regions: Sequence[NDArray[np.bool_] | None], level: float = 0.05
) -> float:
    """Smallest threshold at which at most ``level`` of a new healthy image's pixels is attributed, in expectation.

    The loss of an image is its share of attributed pixels, at most 1, so the guarantee holds where the mean over the n
    images is at most ``level - (1 - level) / n`` (their equation 4).

    Args:
        maps: Maps [H, W] of n healthy images that are exchangeable with the new one: none of them trained a model or
            set another threshold.
        regions: Pixels to count of each image, bool [H, W]; None for the whole image.
        level: Expected share of attributed pixels, in (0, 1).

    Returns:
        The threshold, in units of the maps.

    Raises:
        ValueError: If n < (1 - level) / level, which is too few for any guarantee, or a region has no pixel.
    """
    n = len(maps)
    allowed = level - (1 - level) / n if n else -1.0
    if allowed < 0:
        needed = int(np.ceil(1 / level)) - 1
        raise ValueError(f"{n} healthy images are too few for a level of {level:g}; at least {needed} are needed")
    # Every pixel weighs the reciprocal of its region's size, so every image has the same weight.
    inside = [_inside(saliency, region) for saliency, region in zip(maps, regions, strict=True)]
    values = np.concatenate(inside)
    weights = np.concatenate([np.full(len(part), 1 / len(part) / n) for part in inside])
    # Lower the threshold from the highest value until the mean share reaches what is allowed.
    order = np.argsort(-values, kind="stable")
    taken = np.cumsum(weights[order])  # mean share with a threshold just below the k highest values
    first_excluded = int(np.searchsorted(taken, allowed, side="right"))
    return float(values[order[min(first_excluded, len(values) - 1)]])


def _inside(saliency: NDArray[np.float32], region: NDArray[np.bool_] | None) -> NDArray[np.float32]:
    """Values [n] of a map in its region; ValueError without any."""
    values = saliency.ravel() if region is None else saliency[region]
    if not values.size:
        raise ValueError("a region has no pixel; leave out images whose lung mask is empty")
    return values
