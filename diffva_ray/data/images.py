"""Decodes image files to float grey in [0, 1], and attribution maps and masks to arrays.

For any bytes, ``decode`` returns an image or raises BadImage with one line that gives the reason. IN_FLIGHT bounds the
memory that all decoding threads use together.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from io import BytesIO
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import BmpImagePlugin, Image, ImageOps, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

from diffva_ray.data import dicom
from diffva_ray.data.contrast import blank_reason
from diffva_ray.data.memory_limit import MemoryLimit
from diffva_ray.data.truncation import DamagedFile, check_end
from diffva_ray.progress import one_line
from diffva_ray.provenance import missing
from diffva_ray.schema import Status
from diffva_ray.storage.opening import open_file

Result = TypeVar("Result")
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".dcm", ".dicom")
MAX_PIXELS = 100_000_000
MAX_BYTES = 4 * MAX_PIXELS  # of a file; twice what uncompressed 16-bit pixels need
MAX_SCANS = 1000  # of a JPEG; a progressive one has about ten. Each scan costs a pass over all pixels, up to a day
DEFLATED = b"1.2.840.10008.1.2.1.99"  # transfer syntax of a deflated DICOM file
DICOM_HEADER_BYTES = 1 << 16  # the transfer syntax is in this part of the file

# Images are opened by these classes: Image.open applies its own size limit, which is global to the process.
SIGNATURES: tuple[tuple[bytes, str, Callable[[BytesIO], Image.Image]], ...] = (
    (b"\x89PNG\r\n\x1a\n", "PNG", PngImagePlugin.PngImageFile),
    (b"\xff\xd8\xff", "JPEG", JpegImagePlugin.JpegImageFile),
    (b"II*\0", "TIFF", TiffImagePlugin.TiffImageFile),
    (b"MM\0*", "TIFF", TiffImagePlugin.TiffImageFile),
    (b"II+\0", "TIFF", TiffImagePlugin.TiffImageFile),
    (b"MM\0+", "TIFF", TiffImagePlugin.TiffImageFile),
    (b"BM", "BMP", BmpImagePlugin.BmpImageFile),
)
MODES = {
    "1": "black and white",
    "L": "grey 8-bit",
    "LA": "grey and alpha 8-bit",
    "P": "palette 8-bit",
    "I;16": "grey 16-bit",
    "I;16B": "grey 16-bit",
    "I": "grey 32-bit",
    "F": "grey float",
}

GREY = ("1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I", "F")  # modes of Pillow without colours

# Pillow's and pydicom's warnings do not matter here or end as a BadImage, and would fill the log.
warnings.filterwarnings("ignore", module=r"(PIL|pydicom)\b")


class BadImage(ValueError):
    """Bytes that are not a usable image. The message is one line.

    Attributes:
        status: Status of the record: ``bad_image``, ``blank`` or ``too_small``.
    """

    def __init__(self, reason: str, status: Status = Status.BAD_IMAGE) -> None:
        super().__init__(one_line(reason))
        self.status = status


# Decoding takes about 10 bytes per pixel, 30 for DICOM. Ten images of 10 megapixels can be decoded at the same time.
IN_FLIGHT = MemoryLimit(MAX_PIXELS)


def decode(data: bytes, min_side: int = 1, bits: int = 16) -> NDArray[np.float32]:
    """Decodes an image file: PNG, JPEG, TIFF (first page), BMP and, with pydicom, DICOM (see ``dicom.grey``).

    The EXIF orientation is applied. 8-bit values are divided by 255, 16-bit values by 2^bits - 1. 32-bit integers are
    divided by 65535 and floats by 1, or by their maximum when that is larger; if any value is negative, minimum and
    maximum are mapped to 0 and 1. Colours become ITU-R 601 luma (from the high byte of 16-bit colours); alpha is
    ignored. Sizes are checked in the header, before any pixel is decoded.

    Args:
        data: The bytes of the file.
        min_side: Minimum length of the shorter side in pixels.
        bits: Number of bits that 16-bit grey files use (``data.bits``); 12-bit values in 16-bit files are common.

    Returns:
        float32 [H, W] in [0, 1]; white is 1.

    Raises:
        BadImage: Not an image, damaged, too small, too large, or with values above 2^bits - 1. Nothing else is raised.
    """
    return _guarded(lambda: _decode(data, min_side, bits, lambda image, _: image))


def decode_square(data: bytes, size: int, min_side: int = 1, bits: int = 16) -> tuple[np.ndarray, tuple[int, int]]:
    """Decodes a chest X-ray and resizes it with ``to_square``.

    Unlike ``decode`` followed by ``to_square``, the full-size image counts towards IN_FLIGHT until it is resized.

    Args:
        data: The bytes of the file.
        size: Side of the result in pixels.
        min_side: Minimum length of the shorter side in pixels.
        bits: Number of bits that 16-bit grey files use (``data.bits``).

    Returns:
        The image, float32 [size, size] in [0, 1], and its original height and width in pixels.

    Raises:
        BadImage: As in ``decode`` and ``check_contrast``.
    """
    image, shape, _ = decode_with_columns(data, size, min_side, bits)
    return image, shape


def decode_colours(data: bytes, size: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Decodes an image with its colours (three equal ones if it is grey) and resizes each channel with ``to_square``.

    Returns float32 [3, size, size] in [0, 1], and the height and width of the file in pixels. Raises BadImage."""

    def finish(image: np.ndarray, _: Any) -> tuple[np.ndarray, tuple[int, int]]:
        channels = np.moveaxis(image, -1, 0) if image.ndim == 3 else [image]
        squares = [to_square(channel, size) for channel in channels]
        return np.stack(squares if len(squares) == 3 else squares * 3), image.shape[:2]

    return _guarded(lambda: _decode(data, 1, 16, finish, colours=True))


def decode_with_columns(
    data: bytes, size: int | None = None, min_side: int = 1, bits: int = 16
) -> tuple[np.ndarray, tuple[int, int], dict[str, str]]:
    """As ``decode_square`` (without ``size`` the image is not resized), and the columns of a DICOM header, which is
    parsed once, where it has them: ``patient`` (hashed), ``view``, ``laterality``, ``age``, ``sex``, ``spacing`` (mm,
    row and column). Nothing else of a header is kept; any other file has no columns."""

    def finish(image: np.ndarray, header: Any) -> tuple[np.ndarray, tuple[int, int], dict[str, str]]:
        check_contrast(image)
        columns = {} if header is None else dicom.header_columns(header)
        return image if size is None else to_square(image, size), image.shape, columns

    return _guarded(lambda: _decode(data, min_side, bits, finish))


def check_contrast(image: NDArray[np.floating]) -> None:
    """Raises BadImage (status ``blank``) for an image, float [H, W] in [0, 1], whose results would be meaningless."""
    if reason := blank_reason(image):
        raise BadImage(f"blank: {reason}", Status.BLANK)


def describe(data: bytes) -> str:
    """Format, colour mode and bit depth of an image file, such as ``PNG grey 16-bit``. Raises BadImage."""

    def header() -> str:
        if is_dicom(data):
            return "DICOM"
        kind, image = open_image(data)
        raw = str(image.tile[0][3]) if getattr(image, "tile", None) else ""
        depth = "16-bit" if "16" in raw else "8-bit"
        if image.mode == "I" and depth == "16-bit":
            return f"{kind} grey 16-bit"
        return f"{kind} {MODES.get(image.mode, f'{image.mode} {depth}')}"

    return _guarded(header)


def _guarded(work: Callable[[], Result]) -> Result:
    """Result of ``work``; turns every exception into BadImage, as damaged files make decoders raise any of them."""
    try:
        return work()
    except BadImage:
        raise
    except (DamagedFile, dicom.UnusableDicom) as error:
        raise BadImage(str(error)) from None
    except MemoryError:
        raise BadImage("not enough memory to decode it") from None
    except Exception as error:
        raise BadImage(f"damaged or truncated image ({type(error).__name__}: {error})") from None


def _decode(
    data: bytes, min_side: int, bits: int, finish: Callable[[np.ndarray, Any], Result], colours: bool = False
) -> Result:
    """Result of ``finish`` for the image and its pydicom data set (None of another file); its pixels count towards
    IN_FLIGHT until ``finish`` returns. ``colours``: an image that is not grey is [H, W, 3]."""
    if is_dicom(data):
        return _decode_dicom(data, min_side, finish)
    kind, image = open_image(data)
    width, height = image.size
    _check_size(width, height, min_side)
    if kind == "TIFF":  # a whole tile is allocated even for a small image
        tile = image.tag_v2.get(322, 1) * image.tag_v2.get(323, 1)
        if tile > MAX_PIXELS:
            raise BadImage(f"its tiles have {tile:,} pixels; at most {MAX_PIXELS:,} are read")
    if kind == "JPEG" and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise BadImage(f"a JPEG with {scans:,} scans; at most {MAX_SCANS:,} are read")
    with IN_FLIGHT(width * height):
        return finish(_pixels(kind, image, data, bits, colours), None)


def _pixels(kind: str, image: Any, data: bytes, bits: int, colours: bool) -> np.ndarray:
    """Grey [H, W] in [0, 1], upright, of an opened image; [H, W, 3] with ``colours`` if the image is not grey."""
    white_is_zero = kind == "TIFF" and image.tag_v2.get(262) == 0
    image.load()
    check_end(kind, data)
    ImageOps.exif_transpose(image, in_place=True)
    if colours and image.mode not in GREY:
        return np.asarray(image.convert("RGB"), np.float32) / 255
    grey = _grey(image, bits)
    if white_is_zero and image.mode.startswith("I;16"):  # Pillow inverts such TIFFs only up to 8 bits
        np.subtract(1, grey, out=grey)
    return grey


def is_dicom(data: bytes) -> bool:
    """Whether a file starts as DICOM: after a preamble, or, as some devices write it, with its first group at once."""
    return data[128:132] == b"DICM" or (data[:2] in (b"\x08\0", b"\x02\0") and data[3:4] == b"\0")


def open_image(data: bytes) -> tuple[str, Any]:
    """Format and opened image; reads only the header."""
    if not data:
        raise BadImage("the file is empty (0 bytes)")
    for signature, kind, opener in SIGNATURES:
        if data.startswith(signature):
            return kind, opener(BytesIO(data))
    raise BadImage("not an image: neither PNG, JPEG, TIFF, BMP nor DICOM")


def _check_size(width: int, height: int, min_side: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width} x {height} is {width * height:,} pixels; at most {MAX_PIXELS:,} are read")
    if min(width, height) < min_side:
        raise BadImage(f"{width} x {height} is too small; the shorter side needs {min_side} pixels", Status.TOO_SMALL)


def _grey(image: Image.Image, bits: int) -> np.ndarray:
    """The pixels in any Pillow mode as float32 [H, W] in [0, 1]. Divides in place to save memory."""
    # 16-bit grey; convert("L") would clip it
    if image.mode.startswith("I;16"):
        grey = np.array(image, np.float32)
        if grey.max(initial=0) >= 1 << bits:
            raise BadImage(f"has the value {grey.max():.0f}, more than {bits} bits hold; increase data.bits={bits}")
        grey /= (1 << bits) - 1
        return grey
    # 32-bit integers and floats
    if image.mode in ("I", "F"):
        values = np.array(image, np.float64)
        if not np.isfinite(values).all():
            raise BadImage("the image has NaN or infinite values")
        low, high = values.min(), values.max()
        if low < 0:  # map [low, high] to [0, 1]; a flat image becomes black
            values -= low
            white = high - low or 1.0
        else:
            white = max(65535.0 if image.mode == "I" else 1.0, high)
        values /= white
        return values.astype(np.float32)
    # all other modes, converted to 8-bit grey
    if image.mode in ("RGBa", "La"):  # premultiplied
        image = image.convert(image.mode.upper())
    grey = np.array(image if image.mode == "L" else image.convert("L"), np.float32)  # convert would copy
    grey /= 255
    return grey


def _decode_dicom(data: bytes, min_side: int, finish: Callable[[np.ndarray, Any], Result]) -> Result:
    """As ``_decode``, for a DICOM file."""
    image = _open_dicom(data)
    width, height = int(image.Columns), int(image.Rows)
    _check_size(width, height, min_side)
    with IN_FLIGHT(width * height):
        return finish(dicom.grey(image), image)


def _open_dicom(data: bytes) -> Any:
    if DEFLATED in data[:DICOM_HEADER_BYTES]:  # a few megabytes may inflate to many gigabytes
        raise BadImage("a deflated DICOM file; save it with another transfer syntax")
    try:
        return dicom.opened(data)
    except ImportError:
        raise BadImage(missing("pydicom", "DICOM files", "dicom")) from None


def to_square(image: NDArray[np.floating], size: int) -> NDArray[np.float32]:
    """Resizes an image to a square without keeping its aspect ratio.

    Bicubic with antialiasing; it rings less at wires and edges than Lanczos.

    Args:
        image: float [H, W] in [0, 1].
        size: Side of the square in pixels.

    Returns:
        float32 [size, size] in [0, 1]; the same pixels when the image has this size already.

    Raises:
        ValueError: The array does not have two dimensions.
    """
    image = np.ascontiguousarray(image, np.float32)
    if image.ndim != 2:
        raise ValueError(f"an image is grey [H, W], got {list(image.shape)}")
    if image.shape == (size, size):
        return image
    return np.clip(np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC), np.float32), 0, 1)


def decode_map(data: bytes) -> NDArray[np.float32]:
    """Decodes the bytes of ``encode_map`` to a signed map, float32 [H, W] in [-1, 1]. Raises BadImage."""
    levels = _guarded(lambda: _decode_png(data, ("I;16", "I;16B", "I"), "an attribution map is a 16-bit grey PNG"))
    return np.clip((levels.astype(np.float32) - 32768) / 32767, -1, 1).astype(np.float32)


def decode_grey(data: bytes) -> NDArray[np.uint8]:
    """Decodes the bytes of ``encode_grey``, the format of a run's images. Raises BadImage."""
    return _guarded(lambda: _decode_png(data, ("L",), "an image of a run is an 8-bit grey PNG"))


def _decode_png(data: bytes, modes: tuple[str, ...], expected: str) -> np.ndarray:
    kind, image = open_image(data)
    if kind != "PNG" or image.mode not in modes:
        raise BadImage(f"{expected}; this is {describe(data)}")
    width, height = image.size
    _check_size(width, height, 1)
    image.load()
    check_end(kind, data)
    return np.asarray(image)


def read_image(path: str) -> NDArray[np.float32]:
    """Reads an image file of any format that ``decode`` supports.

        >>> image = read_image("runs/demo/data/test/COVID/images/COVID-3.png")
        >>> image.ndim, bool(0 <= image.min() <= image.max() <= 1)
        (2, True)

    Args:
        path: A local path or an ``s3://`` address.

    Returns:
        float32 grey [H, W] in [0, 1]; white is 1.

    Raises:
        FileNotFoundError: There is no such file.
        BadImage: The file is not a usable image.
        StoreError: The store cannot be read.
        UnknownScheme: The address has another scheme; a ValueError.
    """
    return _read(path, decode)


def read_map(path: str) -> NDArray[np.float32]:
    """Reads an attribution map that a run has written.

        >>> import pandas, os
        >>> path = pandas.read_parquet("runs/demo/run/records")["attribution_path"][0]
        >>> m = read_map(os.path.join("runs/demo/run", path))
        >>> m.ndim, bool(-1 <= m.min() <= m.max() <= 1)
        (2, True)

    Args:
        path: A local path or an ``s3://`` address.

    Returns:
        float32 [H, W] in [-1, 1]; positive where the image is brighter than its healthy counterfactual.

    Raises:
        FileNotFoundError: There is no such file.
        BadImage: The file is not an attribution map.
        StoreError: The store cannot be read.
        UnknownScheme: The address has another scheme; a ValueError.
    """
    return _read(path, decode_map)


def _read(path: str, decoder: Callable[[bytes], NDArray[np.float32]]) -> NDArray[np.float32]:
    """The decoded file; a BadImage names its path."""
    store, name = open_file(path)
    data = store.read(name)
    try:
        return decoder(data)
    except BadImage as error:
        raise BadImage(f"{path}: {error}", error.status) from None


def decode_mask(data: bytes, size: int) -> NDArray[np.bool_]:
    """Decodes a mask to bool [size, size]: true above half of the format's maximum, nearest pixel. Raises BadImage."""
    return _guarded(lambda: _decode(data, 1, 16, lambda grey, _: _mask(grey, size)))


def _mask(grey: np.ndarray, size: int) -> np.ndarray:
    """The mask [size, size] of a decoded image."""
    if 0 < grey.max() <= 0.5:  # values 0 and 1, or labels, would silently give an empty mask
        raise BadImage(f"a mask has the values 0 and white; the maximum of this one is {grey.max():.3f} of white")
    mask = Image.fromarray(np.where(grey > 0.5, 255, 0).astype(np.uint8))
    return np.asarray(mask.resize((size, size), Image.Resampling.NEAREST)) > 0
