"""Where the lungs are on an image that has no mask of them.

The finder is plain (dark, large, one on each side, off the image's edge) and would rather find nothing than something
else; it is for healthy images, whose lungs are dark.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from diffva_ray.schema import Mask

# Not from the literature: these and the numbers of _pair are our own, for upright frontal images, and strict, so that
# what passes is a pair of lungs.
GRID = 128  # pixels a side on which lungs are searched
MARGIN = 5  # pixels of that grid, at either side
LEAST, MOST = 0.035, 0.22  # of the image's area, one lung
LEVELS = np.linspace(0.3, 0.75, 16)  # quantiles of the image's inner part that are tried as thresholds


def find_lungs(image: NDArray[np.float32]) -> Mask | None:
    """The lungs of a healthy image [size, size] in [0, 1] as bool [size, size]; None where no plausible pair shows.

    Of the thresholds whose dark regions are one plausible lung on each side, the one is taken at which the pair is
    large and its outline smooth.
    """
    small = np.asarray(Image.fromarray(image).resize((GRID, GRID), Image.Resampling.BILINEAR))
    smooth = ndimage.gaussian_filter(small, 0.018 * GRID)  # ribs must not cut a lung into slices
    flat = smooth - ndimage.gaussian_filter(small, 0.25 * GRID)  # nor exposure hide one of them
    inner = flat[GRID // 8 : -GRID // 5, GRID // 8 : -GRID // 8]
    best: Mask | None = None
    best_score = 0.0
    for level in np.quantile(inner, LEVELS):
        pair = _pair(flat < level)
        if pair is None:
            continue
        score = _roundness(pair) ** 3 * float(np.sqrt(pair.mean()))
        if score > best_score:
            best, best_score = pair, score
    if best is None:
        return None
    grown = Image.fromarray(best.astype(np.float32)).resize(image.shape[::-1], Image.Resampling.BICUBIC)
    return np.asarray(grown) > 0.5


def _pair(dark: Mask) -> Mask | None:
    """One plausible lung on each side of the midline, filled and smoothed; None where either is missing."""
    labels = ndimage.label(ndimage.binary_opening(dark, iterations=3))[0]
    sides: dict[bool, Mask] = {}
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        region = labels == number
        if not LEAST <= region.mean() <= MOST or _touches_edge(box):
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
    if len(sides) < 2:
        return None
    areas = sorted(float(side.sum()) for side in sides.values())
    if areas[0] < 0.45 * areas[1]:
        return None
    both = ndimage.binary_fill_holes(sides[True] | sides[False])
    smooth = ndimage.gaussian_filter(both.astype(np.float32), 1.5) > 0.5
    return smooth if ndimage.label(smooth)[1] == 2 else None


def _touches_edge(box: tuple[slice, slice]) -> bool:
    """Air around the patient is dark, too, and reaches the edge; lungs on an image do not."""
    return box[1].start < MARGIN or box[1].stop > GRID - MARGIN or box[0].start < 1 or box[0].stop > GRID - 1


def _roundness(pair: Mask) -> float:
    """Area of the pair over that of its lungs' convex outlines, roughly: by a closing of a lung's half width."""
    closed = ndimage.binary_closing(np.pad(pair, 16), iterations=8)
    return float(pair.sum() / closed.sum())
