"""Refuses PNG and JPEG files that are truncated, damaged or joined with other data; Pillow decodes some of them."""

from __future__ import annotations

import re
import zlib

# A JPEG marker, except stuffed bytes and restart markers. Any number of 0xff may precede a marker; matching only the
# last one keeps the search linear (``\xff+`` takes hours for a megabyte of them).
JPEG_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")


class DamagedFile(ValueError):
    """Bytes that are not exactly one whole image; the message is one line."""


def check_end(kind: str, data: bytes) -> None:
    """Raises DamagedFile when a PNG or JPEG file has no end mark, or data after it other than zero padding.

    Other formats (``kind``: TIFF, BMP) have no end mark and are not checked.
    """
    if kind not in ("PNG", "JPEG"):
        return
    end = _png_end(data) if kind == "PNG" else _jpeg_end(data)
    if end is None:
        raise DamagedFile(f"truncated {kind}: its end mark is missing")
    surplus = len(data[end:].rstrip(b"\0"))
    if surplus:
        raise DamagedFile(f"{surplus} bytes follow the end of the {kind} image")


def _png_end(data: bytes) -> int | None:
    """Offset just behind the IEND chunk; None when there is none. Checks every checksum on the way: Pillow does not
    check those of the pixels, where a few wrong bits change the whole image."""
    at, view = 8, memoryview(data)
    while at + 12 <= len(data):
        kind, body, at = data[at + 4 : at + 8], at + 4, at + 12 + int.from_bytes(data[at : at + 4], "big")
        if at <= len(data) and zlib.crc32(view[body : at - 4]) != int.from_bytes(view[at - 4 : at], "big"):
            raise DamagedFile(f"damaged PNG: the checksum of its {kind!r} is wrong")
        if kind == b"IEND":
            return at if at <= len(data) else None
    return None


def _jpeg_end(data: bytes) -> int | None:
    """Offset just behind the end-of-image mark, or of the end of a file that declares further images (MPF); None when
    there is none."""
    at = 2
    while (match := JPEG_MARKER.search(data, at)) is not None:
        marker, at = match[1], match.end()
        if marker == b"\xd9":
            return at
        if marker == b"\xe2" and data[at + 2 : at + 6] == b"MPF\0":  # phones append previews on purpose
            return len(data)
        at += int.from_bytes(data[at : at + 2], "big")
    return None
