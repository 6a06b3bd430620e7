"""Recognises decoded images without content: flat ones, masks, values off the window."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MIN_CONTRAST = 1 / 16  # of the grey scale; 12-bit values in a 16-bit file reach just less
MAX_TWO_VALUED = 0.95  # share of black and white pixels; a real X-ray in a wide black frame has less
DITHERED = 0.1  # share of neighbouring pixels that differ; the outlines of a mask have less


def blank_reason(image: NDArray[np.floating]) -> str:
    """Why an image, float [H, W] in [0, 1], has no content; empty for a usable image. Either 90 % of its values are
    within MIN_CONTRAST, or more than MAX_TWO_VALUED of its pixels are in black or white areas."""
    rows, columns = (max(1, side // 128) for side in image.shape)  # a grid is enough for a large image
    grid = image[::rows, ::columns]
    low, high = np.percentile(grid, (5, 95))
    if not high - low >= MIN_CONTRAST:
        return (
            f"90 % of the values are between {low:.3f} and {high:.3f} of the grey scale: a flat image, a DICOM window "
            "off its values, or a 16-bit file that uses fewer bits (see diffva inspect; --set data.bits=12)"
        )
    share = ((grid <= 0) | (grid >= 1)).mean()
    if share > MAX_TWO_VALUED and (grid[:, 1:] != grid[:, :-1]).mean() <= DITHERED:  # not dots that look grey
        return f"{share:.0%} of the pixels are black or white: a mask, or a DICOM window far too narrow"
    return ""
