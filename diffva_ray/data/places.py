"""Where a lesion is, in words: side, zone, size and number, from its mask and the lungs.

The thresholds are our own. Sides are the patient's: the patient's left is on the image's right.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

SIDES = ("left", "right")
ZONES = ("upper", "middle", "lower")  # thirds of the lungs' height
SIZES = ("small", "medium", "large")
SEVERITIES = ("mild", "moderate", "severe")
BILATERAL = 0.2  # of a lesion's area: with as much on either side it is bilateral
LARGE = (0.08, 0.20)  # of the lungs' area, from which a lesion is medium and large
SEPARATE = 0.2  # of the largest lesion's area, from which another part counts as a lesion
LUNG_ROWS = (0.12, 0.76)  # of the height of a frontal image without a lung mask: its lungs
LUNG_AREA = 0.28  # of the area of such an image


@dataclass(frozen=True)
class Place:
    """Place and extent of the lesions of one image, as words."""

    side: str  # of SIDES, or bilateral
    zone: str  # of ZONES: the third of the lungs' height that holds the lesions' centre; "" if they are bilateral
    size: str  # of SIZES: by their share of the lungs' area
    count: int  # number of separate lesions


def place_of(weight: NDArray[np.floating] | NDArray[np.bool_], lungs: NDArray[np.bool_] | None = None) -> Place | None:
    """Describe a lesion.

    Args:
        weight: Mask of the lesion [H, W]; or weights in [0, 1], such as the size of a change, whose sum counts as area.
        lungs: Lung mask [H, W]; None: the middle of the image stands for them.

    Returns:
        The place; None for an empty mask.
    """
    height, width = weight.shape
    total = float(weight.sum())
    if total <= 0:
        return None
    # lungs: their middle, rows and area
    top, bottom = _rows_of(lungs, height)
    middle, area = width / 2, LUNG_AREA * height * width
    if lungs is not None and lungs.any():
        middle, area = middle_of(lungs), float(lungs.sum())
    # side
    centres = np.arange(width) + 0.5
    left = float(weight[:, centres > middle].sum()) / total
    side = "bilateral" if BILATERAL < left < 1 - BILATERAL else "left" if left > 0.5 else "right"
    # zone and size
    down = float((weight.sum(axis=1) * (np.arange(height) + 0.5)).sum()) / total
    third = int(3 * np.clip((down - top) / (bottom - top), 0, 0.999))
    size = SIZES[int(np.searchsorted(LARGE, total / area, side="right"))]
    labels, number = ndimage.label(weight > 0.5)
    areas = ndimage.sum_labels(np.ones_like(labels), labels, range(1, number + 1))
    count = int((areas >= SEPARATE * areas.max()).sum()) if number else 0
    return Place(side, "" if side == "bilateral" else ZONES[third], size, count)


def middle_of(lungs: NDArray[np.bool_]) -> float:
    """The column between the lungs of a mask [H, W]; the image's own middle for an empty one."""
    columns = np.flatnonzero(lungs.any(axis=0))
    return float(columns[0] + columns[-1] + 1) / 2 if columns.size else lungs.shape[1] / 2


def zone_rows_of(zone: str, lungs: NDArray[np.bool_] | None, height: int) -> slice:
    """The rows of an image of a height that belong to one of ZONES."""
    top, bottom = _rows_of(lungs, height)
    first, last = (top + (ZONES.index(zone) + part) * (bottom - top) / len(ZONES) for part in (0, 1))
    return slice(round(first), round(last))


def _rows_of(lungs: NDArray[np.bool_] | None, height: int) -> tuple[float, float]:
    """The rows between which the lungs are."""
    if lungs is None or not lungs.any():
        return LUNG_ROWS[0] * height, LUNG_ROWS[1] * height
    rows = np.flatnonzero(lungs.any(axis=1))
    return float(rows[0]), float(rows[-1] + 1)
