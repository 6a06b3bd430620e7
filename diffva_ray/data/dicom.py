"""Converts DICOM pixels to grey in [0, 1] by the steps of PS3.3 (C.7.6.3, C.11.1, C.11.2), with pydicom."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffva_ray.data.columns import described, patient_key
from diffva_ray.progress import one_line
from diffva_ray.provenance import missing

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601
TAILS = (0.1, 99.9)  # percentiles that become black and white when a file has no window


TAGS = {  # header elements by column, the first that is there
    "view": ("ViewPosition",),
    "laterality": ("ImageLaterality", "Laterality"),
    "age": ("PatientAge",),
    "sex": ("PatientSex",),
    "spacing": ("PixelSpacing", "ImagerPixelSpacing"),
}


# A full-size image (FULL pixels or more) narrower than this in mm shows no chest: its header has kept the spacing of
# the radiograph before it was resized. Those of RSNA 2018 and SIIM-ACR do: NIH's radiographs at 1024 px.
NARROWEST, FULL = 200.0, 512


class UnusableDicom(ValueError):
    """A DICOM file that is not a single grey image; the message is one line."""


def opened(data: bytes) -> Any:
    """The file as a pydicom data set; a file without preamble or file meta information is read by its encoding."""
    from pydicom import dcmread, uid

    image = dcmread(BytesIO(data), force=True)
    if "TransferSyntaxUID" not in image.file_meta:
        implicit, little = image.original_encoding
        explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
        image.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else explicit
    return image


def header_columns(image: Any) -> dict[str, str]:
    """The elements of TAGS as text, and the hash of the patient's id; without empty ones."""
    values = {column: [image.get(tag) for tag in tags] for column, tags in TAGS.items()}
    found = {column: next((value for value in given if value), "") for column, given in values.items()}
    columns = {column: one_line("/".join(map(str, np.ravel(value))), 40) for column, value in found.items()}
    columns["patient"] = patient_key(str(image.get("PatientID") or ""))
    if _is_of_another_size(image, found["spacing"]):
        del columns["spacing"]
    return described(columns)


def _is_of_another_size(image: Any, spacing: Any) -> bool:
    """Whether ``spacing`` (mm of a row, mm of a column) cannot be that of the stored pixels."""
    width = int(image.get("Columns") or 0)
    return width >= FULL and np.size(spacing) == 2 and float(spacing[1]) * width < NARROWEST


def _pixels(image: Any) -> NDArray[Any]:
    """The stored values, decompressed. Raises UnusableDicom when no installed package can do that."""
    try:
        pixels: NDArray[Any] = image.pixel_array
        return pixels
    except (RuntimeError, NotImplementedError) as error:
        if "missing dependencies" in str(error) or "no available" in str(error):
            raise UnusableDicom(
                missing("gdcm", f"DICOM files in {image.file_meta.TransferSyntaxUID.name}", "dicom")
            ) from None
        raise


def grey(image: Any) -> NDArray[np.float32]:
    """Converts the pixels of a DICOM file to grey; dense tissue is bright.

    The modality table is applied, then the file's VOI table or first window, whose whole range is mapped to [0, 1].
    Without table and window, the percentiles TAILS become black and white, so that a single hot pixel does not darken
    the image. MONOCHROME1 is inverted. Declared padding (PixelPaddingValue, PixelPaddingRangeLimit) takes no part in
    these steps and becomes black. Colours become ITU-R 601 luma.

    Args:
        image: A pydicom data set.

    Returns:
        float32 [H, W] in [0, 1].

    Raises:
        UnusableDicom: Several frames, a colour palette, an invalid padding value, NaN or infinite values.
    """
    # refuse what is not one grey or RGB image
    frames = int(image.get("NumberOfFrames") or 1)
    if frames > 1:
        raise UnusableDicom(f"a DICOM file of {frames} frames; an image has one")
    photometric = str(image.PhotometricInterpretation)
    if photometric == "PALETTE COLOR":
        raise UnusableDicom("a DICOM file with a colour palette; an image is MONOCHROME1 or MONOCHROME2")
    # convert the stored values to the displayed range
    stored = _pixels(image)
    if stored.ndim == 3:
        return np.clip(stored[..., :3] @ LUMA / (2 ** int(image.BitsStored) - 1), 0, 1).astype(np.float32)
    if stored.dtype.kind not in "iu" or stored.itemsize > 2:
        return _scaled(image, stored).astype(np.float32)
    # all steps depend on the value alone: they are computed once for each, which is twice as fast
    first = min(0, int(stored.min()))
    shifted = stored.astype(np.int32) - first if first else stored
    levels = np.arange(first, int(stored.max()) + 1).astype(stored.dtype)
    counts = None if _table(image) or _window(image) else np.bincount(shifted.ravel())
    return np.take(_scaled(image, levels, counts).astype(np.float32), shifted)


def _scaled(image: Any, stored: NDArray[Any], counts: NDArray[np.integer] | None = None) -> NDArray[np.floating]:
    """Stored values in [0, 1], dense tissue bright, padding black. ``counts``: how often each occurs; once if None."""
    padding = _padding(image, stored)
    inside = ~padding if counts is None else ~padding & (counts > 0)
    values, low, high = _displayed(image, stored, inside, counts)
    if not np.isfinite(values[inside]).all():
        raise UnusableDicom("the image has NaN or infinite values")
    scaled = np.clip((values - low) / (high - low), 0, 1) if high != low else np.zeros_like(values)
    if str(image.PhotometricInterpretation) == "MONOCHROME1":
        scaled = 1 - scaled
    scaled[padding] = 0
    return scaled


def _displayed(
    image: Any, stored: NDArray[Any], inside: NDArray[np.bool_], counts: NDArray[np.integer] | None
) -> tuple[NDArray[np.float64], float, float]:
    """The values after the modality and VOI steps, and the values of black and of white."""
    from pydicom.pixels.processing import apply_modality_lut, apply_voi, apply_windowing

    values = apply_modality_lut(stored, image)
    # a VOI table: its whole output range
    if _table(image):
        table = image.VOILUTSequence[0]
        entries, first, _ = (int(value) for value in table.LUTDescriptor)
        outputs = apply_voi(np.arange(first, first + (entries or 1 << 16)), image)
        return np.asarray(apply_voi(values, image), np.float64), float(outputs.min()), float(outputs.max())
    # a window: its output at its two ends
    if _window(image):
        extremes = np.array([-1e12, 1e12])  # outside every window, so they give its black and its white
        with np.errstate(over="ignore"):  # the exponential of a sigmoid window overflows
            low, high = (float(value) for value in apply_windowing(extremes, image))
            return np.asarray(apply_windowing(values, image), np.float64), low, high
    # neither: percentiles of the pixels that are not padding
    values = np.asarray(values, np.float64)
    if not inside.any():
        return values, 0.0, 0.0
    weights = None if counts is None else counts[inside]
    low, high = np.percentile(values[inside], TAILS) if weights is None else _percentiles(values[inside], weights)
    return values, float(low), float(high)


def _percentiles(values: NDArray[np.float64], counts: NDArray[np.integer]) -> NDArray[np.float64]:
    """The percentiles TAILS of values that occur ``counts`` times, as np.percentile has them of all."""
    order = np.argsort(values)
    ends = np.cumsum(counts[order])  # number of the values up to each one
    places = np.array(TAILS) / 100 * (ends[-1] - 1)
    lower, upper = (values[order][np.searchsorted(ends, index, side="right")]
                    for index in (np.floor(places), np.ceil(places)))  # fmt: skip
    found: NDArray[np.float64] = lower + (upper - lower) * (places % 1)
    return found


def _table(image: Any) -> bool:
    tables = image.get("VOILUTSequence")
    return bool(tables) and tables[0].get("LUTData") is not None


def _window(image: Any) -> bool:
    """Whether the file has a usable window: some devices write a width of 0, or no width."""
    centre, width = (np.ravel([] if (value := image.get(name)) is None else value)
                     for name in ("WindowCenter", "WindowWidth"))  # fmt: skip
    return bool(len(centre) and len(width)) and float(width[0]) >= 1


def _padding(image: Any, stored: NDArray[Any]) -> NDArray[np.bool_]:
    """Pixels that the file declares as padding (PS3.3 C.7.5.1.1.2), by their stored values."""
    if image.get("PixelPaddingValue") is None:
        return np.zeros(stored.shape, bool)
    value = _as_stored(image, image.PixelPaddingValue)
    limit = image.get("PixelPaddingRangeLimit")
    end = value if limit is None else _as_stored(image, limit)
    return (stored >= min(value, end)) & (stored <= max(value, end))


def _as_stored(image: Any, value: Any) -> int:
    """Padding value with the sign convention of the pixels: some devices write it unsigned for signed pixels, or the
    other way round."""
    try:
        number, bits = int(value), int(image.BitsAllocated)
    except (TypeError, ValueError):
        raise UnusableDicom(f"its padding value {one_line(str(value), 40)} is not a number") from None
    if image.PixelRepresentation == 1 and number >= 1 << (bits - 1):
        return number - (1 << bits)
    if image.PixelRepresentation == 0 and number < 0:
        return number + (1 << bits)
    return number
