"""DICOM files: from stored values to grey in [0, 1] by the steps of PS3.3 (C.7.6.3, C.11.1, C.11.2), with pydicom."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffva_ray.progress import one_line

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601
TAILS = (0.1, 99.9)  # percentiles that become black and white where a file brings no window


class UnusableDicom(ValueError):
    """A DICOM file that is no single grey image; the message is one line."""


def grey(image: Any) -> NDArray[np.floating]:
    """The pixels of a pydicom data set as float [H, W] in [0, 1], dense tissue bright.

    Stored values go through the modality table, then through the file's own VOI table or first window, whose range
    becomes [0, 1] whatever part of it the image uses. Without one, the percentiles TAILS become black and white: a hot
    pixel must not darken the rest. MONOCHROME1 is inverted. Declared padding (PixelPaddingValue, RangeLimit) is no
    part of the image: it is left out of all this and comes back black. Raises UnusableDicom.
    """
    frames = int(image.get("NumberOfFrames") or 1)
    if frames > 1:
        raise UnusableDicom(f"a DICOM file of {frames} frames; an image has one")
    photometric = str(image.PhotometricInterpretation)
    if photometric == "PALETTE COLOR":
        raise UnusableDicom("a DICOM file with a colour palette; an image is MONOCHROME1 or MONOCHROME2")
    stored = image.pixel_array
    if stored.ndim == 3:
        return np.clip(stored[..., :3] @ LUMA / (2 ** int(image.BitsStored) - 1), 0, 1)
    padding = _padding(image, stored)
    values, low, high = _displayed(image, stored, ~padding)
    if not np.isfinite(values[~padding]).all():
        raise UnusableDicom("the image holds NaN or infinite values")
    shown = np.clip((values - low) / (high - low), 0, 1) if high != low else np.zeros_like(values)
    if photometric == "MONOCHROME1":
        shown = 1 - shown
    shown[padding] = 0
    return shown


def _displayed(image: Any, stored: NDArray[Any], inside: NDArray[np.bool_]) -> tuple[NDArray[np.float64], float, float]:
    """The values after the modality and VOI steps, and those that are black and white."""
    from pydicom.pixels.processing import apply_modality_lut, apply_voi, apply_windowing

    values = apply_modality_lut(stored, image)
    if _table(image):
        table = image.VOILUTSequence[0]
        entries, first, _ = (int(value) for value in table.LUTDescriptor)
        all_of_it = apply_voi(np.arange(first, first + (entries or 1 << 16)), image)
        return np.asarray(apply_voi(values, image), np.float64), float(all_of_it.min()), float(all_of_it.max())
    if _window(image):
        beyond = np.array([-1e12, 1e12])  # where every window has ended: what it makes of black and of white
        with np.errstate(over="ignore"):  # of a sigmoid's exponential
            low, high = (float(value) for value in apply_windowing(beyond, image))
            return np.asarray(apply_windowing(values, image), np.float64), low, high
    values = np.asarray(values, np.float64)
    known = values[inside]
    if not known.size:
        return values, 0.0, 0.0
    low, high = np.percentile(known, TAILS)
    return values, float(low), float(high)


def _table(image: Any) -> bool:
    tables = image.get("VOILUTSequence")
    return bool(tables) and tables[0].get("LUTData") is not None


def _window(image: Any) -> bool:
    """Whether there is a window that can be used: some devices write a width of 0, or none."""
    centre, width = (np.ravel(image.get(name) if image.get(name) is not None else []) for name in
                     ("WindowCenter", "WindowWidth"))  # fmt: skip
    return bool(len(centre) and len(width)) and float(width[0]) >= 1


def _padding(image: Any, stored: NDArray[Any]) -> NDArray[np.bool_]:
    """Where the file says that there is no image (PS3.3 C.7.5.1.1.2), by stored values."""
    if image.get("PixelPaddingValue") is None:
        return np.zeros(stored.shape, bool)
    one = _as_stored(image, image.PixelPaddingValue)
    limit = image.get("PixelPaddingRangeLimit")
    other = one if limit is None else _as_stored(image, limit)
    return (stored >= min(one, other)) & (stored <= max(one, other))


def _as_stored(image: Any, value: Any) -> int:
    """A padding value as the pixels have it: some devices write it without a sign for signed pixels, or the reverse."""
    try:
        number, bits = int(value), int(image.BitsAllocated)
    except (TypeError, ValueError):
        raise UnusableDicom(f"its padding value {one_line(str(value), 40)} is no number") from None
    if image.PixelRepresentation == 1 and number >= 1 << (bits - 1):
        return number - (1 << bits)
    if image.PixelRepresentation == 0 and number < 0:
        return number + (1 << bits)
    return number
