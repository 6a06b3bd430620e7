"""Cardiothoracic ratio (Danzer 1919) from lung fields: width of the space between the lungs over that of the thorax."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

MIN_LUNG_AREA = 0.02  # of each lung, as a fraction of the image's area
UPPER = 0.5  # upper part of the lungs' height that holds the mediastinum; the heart is below


def cardiothoracic_ratio(lungs: NDArray[np.bool_]) -> float | None:
    """Cardiothoracic ratio of an upright image; above one half is called cardiomegaly.

    As measured on paper: the farthest reaches of the heart left and right of the midline are added, at whatever heights
    they are, and divided by the widest inner diameter of the thorax. The midline is halfway between the inner borders
    of the lungs in their upper half.

    Args:
        lungs: Visible lung fields without the heart, bool [H, W].

    Returns:
        Width of the heart's shadow over that of the thorax, in (0, 1). None unless there is one lung on each side, and
        where the space between them is no heart (no width, or wider than the thorax).
    """
    # The two largest connected parts are the lungs.
    labels, count = ndimage.label(lungs)
    sizes = ndimage.sum_labels(lungs, labels, range(1, count + 1)) if count else []
    large = [number for number, size in enumerate(sizes, 1) if size >= MIN_LUNG_AREA * lungs.size]
    if len(large) < 2:
        return None
    large = sorted(large, key=lambda number: -sizes[number - 1])[:2]
    left, right = sorted((labels == number for number in large), key=lambda side: ndimage.center_of_mass(side)[1])
    rows = np.flatnonzero(left.any(axis=1) & right.any(axis=1))
    if len(rows) < 4:
        return None

    # Inner and outer borders, in every row that crosses both lungs.
    columns = np.arange(lungs.shape[1])
    inner_left = np.array([columns[left[row]].max() for row in rows]) + 1.0  # edges of pixels
    inner_right = np.array([columns[right[row]].min() for row in rows]).astype(float)
    outer = [(columns[left[row]].min(), columns[right[row]].max() + 1) for row in rows]
    thorax = float(max(end for _, end in outer) - min(start for start, _ in outer))

    # Midline from the upper rows, reaches of the heart from the lower ones.
    split = int(len(rows) * UPPER)
    middle = float(np.median((inner_left[:split] + inner_right[:split]) / 2))
    lower = slice(split, max(int(len(rows) * 0.9), split + 1))  # the lowest tenth tapers sideways, past the heart
    heart = max(middle - inner_left[lower].min(), 0.0) + max(inner_right[lower].max() - middle, 0.0)
    return float(heart / thorax) if 0 < heart < thorax else None
