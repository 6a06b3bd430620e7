"""Cardiothoracic ratio (Danzer 1919) from lung fields: the heart is what lies between the lungs, the thorax what holds
them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

LEAST = 0.02  # of the image's area, each lung
UPPER = 0.5  # of the lungs' height; the heart is looked for below, the mediastinum above is no heart


def cardiothoracic_ratio(lungs: NDArray[np.bool_]) -> float | None:
    """Width of the heart's shadow over that of the thorax, in (0, 1), from the visible lung fields bool [H, W] (without
    the heart); above one half is called cardiomegaly on an upright image.

    As on paper: the farthest reaches of the heart to either side of the midline are added, at whatever heights they
    are, and divided by the widest inner diameter of the thorax. The midline is halfway between the lungs' inner borders
    in the upper half. None unless there is one lung on each side, and where what lies between is no heart (no width, or
    wider than the thorax).
    """
    labels, count = ndimage.label(lungs)
    sizes = ndimage.sum_labels(lungs, labels, range(1, count + 1)) if count else []
    large = [number for number, size in enumerate(sizes, 1) if size >= LEAST * lungs.size]
    if len(large) < 2:
        return None
    large = sorted(large, key=lambda number: -sizes[number - 1])[:2]
    left, right = sorted((labels == number for number in large), key=lambda side: ndimage.center_of_mass(side)[1])
    rows = np.flatnonzero(left.any(axis=1) & right.any(axis=1))
    if len(rows) < 4:
        return None
    columns = np.arange(lungs.shape[1])
    inner_left = np.array([columns[left[row]].max() for row in rows]) + 1.0  # edges of pixels
    inner_right = np.array([columns[right[row]].min() for row in rows]).astype(float)
    outer = [(columns[left[row]].min(), columns[right[row]].max() + 1) for row in rows]
    thorax = float(max(end for _, end in outer) - min(start for start, _ in outer))
    split = int(len(rows) * UPPER)
    middle = float(np.median((inner_left[:split] + inner_right[:split]) / 2))
    # The outermost rows of the bases taper to the sides and would count as heart: the lowest tenth is left out.
    lower = slice(split, max(int(len(rows) * 0.9), split + 1))
    heart = max(middle - inner_left[lower].min(), 0.0) + max(inner_right[lower].max() - middle, 0.0)
    return float(heart / thorax) if 0 < heart < thorax else None
