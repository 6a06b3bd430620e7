"""Finds the lungs in a healthy image that has no lung mask.

The method is simple: two large dark regions, one on each side, that do not touch the border of the image. It is strict:
it returns nothing rather than a wrong region. Lungs with opacities are not dark and are not found.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from diffva_ray.schema import Mask

# These numbers and those in _pair are our own (not from the literature), chosen for upright frontal images.
GRID = 128  # side of the grid on which lungs are searched, in pixels
MARGIN = 5  # minimum distance of a lung from the left and right border, in pixels of the grid
MIN_AREA, MAX_AREA = 0.035, 0.22  # of one lung, as a fraction of the image
LEVELS = np.linspace(0.3, 0.75, 16)  # thresholds to try, as quantiles of the image's inner part


def find_lungs(image: NDArray[np.float32]) -> Mask | None:
    """Lung mask, bool [size, size], of a healthy image [size, size] in [0, 1]; None when no plausible pair is found.

    Each threshold that gives one plausible lung on each side is scored; a large pair with a smooth outline wins.
    """
    # remove ribs (they would cut a lung into slices) and differences in exposure between the sides
    small = np.asarray(Image.fromarray(image).resize((GRID, GRID), Image.Resampling.BILINEAR))
    smooth = ndimage.gaussian_filter(small, 0.018 * GRID)
    flat = smooth - ndimage.gaussian_filter(small, 0.25 * GRID)
    # choose the best threshold
    inner = flat[GRID // 8 : -GRID // 5, GRID // 8 : -GRID // 8]
    best: Mask | None = None
    best_score = 0.0
    for level in np.quantile(inner, LEVELS):
        pair = _pair(flat < level)
        score = 0.0 if pair is None else _roundness(pair) ** 3 * float(np.sqrt(pair.mean()))
        if score > best_score:
            best, best_score = pair, score
    if best is None:
        return None
    # back to the size of the image
    grown = Image.fromarray(best.astype(np.float32)).resize(image.shape[::-1], Image.Resampling.BICUBIC)
    return np.asarray(grown) > 0.5


def _pair(dark: Mask) -> Mask | None:
    """One plausible lung on each side of the midline, filled and smoothed; None when either is missing."""
    # keep the largest region of each side that has the size, position and shape of a lung
    labels = ndimage.label(ndimage.binary_opening(dark, iterations=3))[0]
    sides: dict[bool, Mask] = {}
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        region = labels == number
        if not MIN_AREA <= region.mean() <= MAX_AREA or _touches_edge(box):
            continue
        down, across = (float(x) / GRID for x in ndimage.center_of_mass(region))
        height, width = ((part.stop - part.start) / GRID for part in box)
        upright = 1.1 * width < height < 0.72 and 0.12 < width < 0.45
        filled = region.mean() > 0.42 * height * width
        if not (0.25 < down < 0.65 and 0.15 < across < 0.85 and upright and filled):
            continue
        left = across < 0.5
        if left not in sides or region.sum() > sides[left].sum():
            sides[left] = region
    # both lungs must exist, have similar areas, and stay separate after smoothing
    if len(sides) < 2:
        return None
    areas = sorted(float(side.sum()) for side in sides.values())
    if areas[0] < 0.45 * areas[1]:
        return None
    both = ndimage.binary_fill_holes(sides[True] | sides[False])
    smooth = ndimage.gaussian_filter(both.astype(np.float32), 1.5) > 0.5
    return smooth if ndimage.label(smooth)[1] == 2 else None


def _touches_edge(box: tuple[slice, slice]) -> bool:
    """Whether a region reaches the border of the image, as the dark air around the patient does."""
    return bool(box[1].start < MARGIN or box[1].stop > GRID - MARGIN or box[0].start < 1 or box[0].stop > GRID - 1)


def _roundness(pair: Mask) -> float:
    """Area of the pair divided by its area after a closing by half the width of a lung (about the convex area)."""
    closed = ndimage.binary_closing(np.pad(pair, 16), iterations=8)
    return float(pair.sum() / closed.sum())
