"""Pixels in and out: any image's bytes to float grey in [0, 1], and grey images and signed maps to PNG.

Whatever the bytes are, ``decode`` returns an image or raises BadImage with one line that says why. However many threads
decode, and however large the images, memory stays bounded: ``IN_FLIGHT``.
"""

from __future__ import annotations

import re
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import BmpImagePlugin, Image, ImageOps, JpegImagePlugin, PngImagePlugin, TiffImagePlugin

from diffva_ray.data import dicom
from diffva_ray.data.memory_limit import MemoryLimit
from diffva_ray.progress import one_line
from diffva_ray.provenance import missing
from diffva_ray.schema import Status
from diffva_ray.storage.store import Store, open_file

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".dcm")
MAX_PIXELS = 100_000_000
MAX_BYTES = 4 * MAX_PIXELS  # of one file; 16 bits a pixel, uncompressed, need half of it
MAX_SCANS = 1000  # a progressive JPEG has about ten; each goes over all pixels, so a small file may take a day
LEAST_CONTRAST = 1 / 16  # of the grey scale; 12-bit values in a 16-bit file reach just below it
DEFLATED, HEADER = b"1.2.840.10008.1.2.1.99", 1 << 16  # DICOM's transfer syntax for that, and where it stands

# Opened by their own class: Image.open refuses sizes by a limit that is global to the process, before ours is asked.
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


# Pillow's and pydicom's warnings either do not matter for an image or end as a BadImage; a million images would be a
# million lines.
warnings.filterwarnings("ignore", module=r"(PIL|pydicom)\b")


class BadImage(ValueError):
    """Bytes that are no usable image. The message is one line for people; ``status`` is the record's."""

    def __init__(self, reason: str, status: Status = Status.BAD_IMAGE) -> None:
        super().__init__(one_line(reason))
        self.status = status


# A pixel takes about 10 bytes while it is decoded, and 30 in a DICOM. Images of 10 megapixels still go ten abreast.
IN_FLIGHT = MemoryLimit(MAX_PIXELS)


def decode(data: bytes, min_side: int = 1, bits: int = 16) -> NDArray[np.float32]:
    """The image in ``data`` as float32 [H, W] grey in [0, 1]; white is 1. Raises BadImage, and nothing else.

    PNG, JPEG, TIFF (first page), BMP and, with pydicom, DICOM; turned upright by its EXIF orientation.
    8-bit values are divided by 255 and 16-bit ones by the largest of ``bits``, which is the data set's own choice
    (``data.bits``: 12-bit values in 16-bit files are common); a file with larger values is refused. 32-bit integers
    and floats by their own maximum where they exceed that range, and by their own minimum and maximum where they are
    negative. DICOM as ``dicom.grey`` has it. Colours become ITU-R 601 luma (of 16-bit colours the high byte). Alpha is
    dropped: the grey values below it are the image's.
    Sizes are checked in the header, before a pixel is decoded.
    """
    return _guarded(lambda: _decode(data, min_side, bits, lambda image: image))


def decode_square(data: bytes, size: int, min_side: int = 1, bits: int = 16) -> tuple[np.ndarray, tuple[int, int]]:
    """``to_square(decode(data), size)`` of a chest X-ray, and the image's own height and width. Raises BadImage, also
    for an image that ``check_contrast`` refuses.

    The large image never leaves the bounds on memory, as it does from ``decode``.
    """

    def square(image: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
        check_contrast(image)
        return to_square(image, size), image.shape

    return _guarded(lambda: _decode(data, min_side, bits, square))


def check_contrast(image: NDArray[np.floating]) -> None:
    """Raises BadImage (status ``blank``) for a chest X-ray, float [H, W] in [0, 1], nine tenths of whose values lie
    within LEAST_CONTRAST: a flat image, a window off its values, or values that use a sliver of the file's range.

    Such an image decodes, and everything that is computed from it is nonsense.
    """
    rows, columns = (max(1, side // 256) for side in image.shape)  # of a large image, a grid of it tells as much
    low, high = np.percentile(image[::rows, ::columns], (5, 95))
    if not high - low >= LEAST_CONTRAST:
        raise BadImage(
            f"blank: nine tenths of the image lie between {low:.3f} and {high:.3f} of the grey scale. A flat image, a "
            "DICOM window off its values, or 16-bit values of fewer bits (diffva inspect tells; --set data.bits=12)",
            Status.BLANK,
        )


def describe(data: bytes) -> str:
    """Format, colours and bits of an image as it is stored: ``PNG grey 16-bit``. Raises BadImage."""

    def header() -> str:
        if _is_dicom(data):
            return "DICOM"
        kind, image = _open(data)
        raw = str(image.tile[0][3]) if getattr(image, "tile", None) else ""
        depth = "16-bit" if "16" in raw else "8-bit"
        if image.mode == "I" and depth == "16-bit":
            return f"{kind} grey 16-bit"
        return f"{kind} {MODES.get(image.mode, f'{image.mode} {depth}')}"

    return _guarded(header)


def largest_value(data: bytes) -> int:
    """The largest value that a 16-bit grey image stores. Raises BadImage."""
    return round(float(decode(data).max()) * 65535)


def _guarded(work: Callable[[], Any]) -> Any:
    """Decoders raise whatever a damaged file leads them to; callers see BadImage."""
    try:
        return work()
    except BadImage:
        raise
    except MemoryError:
        raise BadImage("not enough memory to decode it") from None
    except Exception as error:
        raise BadImage(f"damaged or truncated image ({type(error).__name__}: {error})") from None


def _decode(data: bytes, min_side: int, bits: int, finish: Callable[[np.ndarray], Any]) -> Any:
    """What ``finish`` makes of the image, while its pixels are in flight."""
    if _is_dicom(data):
        return _decode_dicom(data, min_side, finish)
    kind, image = _open(data)
    width, height = image.size
    _check_size(width, height, min_side)
    if kind == "TIFF":  # a tile is allocated as a whole, however small the image in it
        tile = image.tag_v2.get(322, 1) * image.tag_v2.get(323, 1)
        if tile > MAX_PIXELS:
            raise BadImage(f"its tiles are of {tile:,} pixels; at most {MAX_PIXELS:,} are read")
    if kind == "JPEG" and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise BadImage(f"a JPEG of {scans:,} scans; at most {MAX_SCANS:,} are read")
    with IN_FLIGHT(width * height):
        return finish(_pixels(kind, image, data, bits))


def _pixels(kind: str, image: Any, data: bytes, bits: int) -> np.ndarray:
    white_is_zero = kind == "TIFF" and image.tag_v2.get(262) == 0
    image.load()
    _check_end(kind, data)
    ImageOps.exif_transpose(image, in_place=True)
    grey = _grey(image, bits)
    if white_is_zero and image.mode.startswith("I;16"):  # Pillow inverts such TIFFs up to 8 bits only
        np.subtract(1, grey, out=grey)
    return grey


def _is_dicom(data: bytes) -> bool:
    return data[128:132] == b"DICM"


def _open(data: bytes) -> tuple[str, Any]:
    """Format and opened image; only the header has been read."""
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
        raise BadImage(f"{width} x {height} is too small; the shorter side needs {min_side}", Status.TOO_SMALL)


def _check_end(kind: str, data: bytes) -> None:
    """A file that stops short of its end mark, or goes on behind it (other than with zero padding), was not copied
    whole, or is two files; TIFF and BMP have no such mark."""
    if kind not in ("PNG", "JPEG"):
        return
    end = _png_end(data) if kind == "PNG" else _jpeg_end(data)
    if end is None:
        raise BadImage(f"truncated {kind}: its end mark is missing")
    surplus = len(data[end:].rstrip(b"\0"))
    if surplus:
        raise BadImage(f"{surplus} bytes follow the end of the {kind} image")


def _png_end(data: bytes) -> int | None:
    """Offset just behind the IEND chunk; None when there is none. The checksums are checked on the way: Pillow leaves
    out those of the pixels, and a few wrong bits there are a whole wrong image."""
    at, view = 8, memoryview(data)
    while at + 12 <= len(data):
        kind, body, at = data[at + 4 : at + 8], at + 4, at + 12 + int.from_bytes(data[at : at + 4], "big")
        if at <= len(data) and zlib.crc32(view[body : at - 4]) != int.from_bytes(view[at - 4 : at], "big"):
            raise BadImage(f"damaged PNG: the checksum of its {kind!r} is wrong")
        if kind == b"IEND":
            return at if at <= len(data) else None
    return None


# Neither a stuffed byte nor a restart mark. Any number of 0xff may stand before a marker; the last one is enough, and
# ``\xff+`` would take hours for a megabyte of them.
JPEG_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")


def _jpeg_end(data: bytes) -> int | None:
    """Offset just behind the end-of-image mark, or of the file where further pictures are declared; None when there is
    none."""
    at = 2
    while (found := JPEG_MARKER.search(data, at)) is not None:
        marker, at = found[1], found.end()
        if marker == b"\xd9":
            return at
        if marker == b"\xe2" and data[at + 2 : at + 6] == b"MPF\0":  # a phone's file: previews follow by design
            return len(data)
        at += int.from_bytes(data[at : at + 2], "big")
    return None


def _grey(image: Image.Image, bits: int) -> np.ndarray:
    if image.mode.startswith("I;16"):  # convert("L") would clip it
        grey = np.array(image, np.float32)
        if grey.max(initial=0) >= 1 << bits:
            raise BadImage(
                f"holds the value {grey.max():.0f}, more than {bits} bits have; raise data.bits, which is {bits}"
            )
        grey /= (1 << bits) - 1  # in place, here and below: a large image is large
        return grey
    if image.mode in ("I", "F"):
        values = np.array(image, np.float64)
        if not np.isfinite(values).all():
            raise BadImage("the image holds NaN or infinite values")
        low, high = values.min(), values.max()
        if low < 0:
            return _stretched(values)
        values /= max(65535.0 if image.mode == "I" else 1.0, high)
        return values.astype(np.float32)
    if image.mode in ("RGBa", "La"):  # premultiplied
        image = image.convert(image.mode.upper())
    grey = np.array(image.convert("L"), np.float32)
    grey /= 255
    return grey


def _stretched(values: np.ndarray) -> np.ndarray:
    """[min, max] of the image to [0, 1]; zeros where it is flat."""
    low, high = values.min(), values.max()
    values = values - low
    if high > low:
        values /= high - low
    return values.astype(np.float32)


def _decode_dicom(data: bytes, min_side: int, finish: Callable[[np.ndarray], Any]) -> Any:
    try:
        import pydicom  # an optional extra
    except ImportError:
        raise BadImage(missing("pydicom", "DICOM files", "dicom")) from None
    if DEFLATED in data[:HEADER]:  # a few megabytes of it may hold many gigabytes, and no header says so
        raise BadImage("a DICOM file deflated as a whole; save it with another transfer syntax")
    image = pydicom.dcmread(BytesIO(data))
    width, height = int(image.Columns), int(image.Rows)
    _check_size(width, height, min_side)
    with IN_FLIGHT(width * height):
        try:
            return finish(dicom.grey(image).astype(np.float32))
        except dicom.UnusableDicom as error:
            raise BadImage(str(error)) from None


def to_square(image: NDArray[np.floating], size: int) -> NDArray[np.float32]:
    """float [H, W] in [0, 1] squashed to float32 [size, size] in [0, 1], aspect not kept; the image itself if it fits.

    Bicubic whose support grows with the reduction: antialiased, and with less ringing at wires and edges than Lanczos.
    Raises ValueError for an array of other than two dimensions.
    """
    image = np.ascontiguousarray(image, np.float32)
    if image.ndim != 2:
        raise ValueError(f"an image is grey [H, W], got {list(image.shape)}")
    if image.shape == (size, size):
        return image
    return np.clip(np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)), 0, 1)


def decode_map(data: bytes) -> NDArray[np.float32]:
    """The signed map of ``encode_map``'s bytes, as float32 [H, W] in [-1, 1]. Raises BadImage."""

    def steps() -> np.ndarray:
        kind, image = _open(data)
        if kind != "PNG" or image.mode not in ("I;16", "I;16B", "I"):
            raise BadImage(f"a map is a 16-bit grey PNG; this is {describe(data)}")
        image.load()
        _check_end(kind, data)
        return np.asarray(image, np.float32)

    return np.clip((_guarded(steps) - 32768) / 32767, -1, 1).astype(np.float32)


def read_image(path: str) -> NDArray[np.float32]:
    """The image in an image file (a local path or ``s3://``), as float32 grey [H, W] in [0, 1]; white is 1. See
    ``decode`` for what is read, and how.

        >>> image = read_image("runs/demo/data/test/COVID/images/COVID-3.png")
        >>> image.ndim, bool(0 <= image.min() <= image.max() <= 1)
        (2, True)

    Raises FileNotFoundError when there is no such file, BadImage when it is no image, StoreError when the store fails,
    UnknownScheme (a ValueError) for an address of another kind.
    """
    store, name = open_file(path)
    return _named(path, lambda: decode(store.read(name)))


def read_map(path: str) -> NDArray[np.float32]:
    """The attribution map in a run's PNG file (a local path or ``s3://``), as float32 [H, W] in [-1, 1].

    Positive is where the image is brighter than its healthy counterfactual:

        >>> import pandas, os
        >>> path = pandas.read_parquet("runs/demo/run/records")["attribution_path"][0]
        >>> m = read_map(os.path.join("runs/demo/run", path))
        >>> m.ndim, bool(-1 <= m.min() <= m.max() <= 1)
        (2, True)

    Raises FileNotFoundError when there is no such file, BadImage when it is no map, StoreError when the store fails,
    UnknownScheme (a ValueError) for an address of another kind.
    """
    store, name = open_file(path)
    return _named(path, lambda: decode_map(store.read(name)))


def _named(path: str, work: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
    try:
        return work()
    except BadImage as error:
        raise BadImage(f"{path}: {error}", error.status) from None


def decode_mask(data: bytes, size: int) -> NDArray[np.bool_]:
    """A mask's bytes as bool [size, size]: nearest pixel, above half of the format's maximum. Raises BadImage."""
    return _guarded(lambda: _decode(data, 1, 16, lambda grey: _mask(grey, size)))


def _mask(grey: np.ndarray, size: int) -> np.ndarray:
    if 0 < grey.max() <= 0.5:  # 0/1 masks would come out empty, and label images half empty, without a word
        raise BadImage(f"a mask is 0 and white; this one reaches {grey.max():.3f} of white only")
    mask = Image.fromarray(np.where(grey > 0.5, 255, 0).astype(np.uint8))
    return np.asarray(mask.resize((size, size), Image.Resampling.NEAREST)) > 0


def read_mask(store: Store, path: str, size: int) -> NDArray[np.bool_] | None:
    """A mask on the model's grid; None when it cannot be read (a mask is an extra, not a reason to lose a record)."""
    try:
        return decode_mask(store.read(path), size)
    except (ValueError, OSError):  # BadImage is a ValueError
        return None
