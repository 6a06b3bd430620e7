"""Truncated PNG and JPEG files, and files with data after the image, are refused; padding and previews are not."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from diffva_ray.data.images import BadImage, decode

RAMP = np.linspace(0, 255, 24 * 20).reshape(24, 20).astype(np.uint8)


def encoded(format: str, **options) -> bytes:
    buffer = BytesIO()
    Image.fromarray(RAMP).save(buffer, format, **options)
    return buffer.getvalue()


def reason(data: bytes) -> str:
    with pytest.raises(BadImage) as caught:
        decode(data)
    return str(caught.value)


def test_png_without_its_last_chunk_is_truncated():
    assert "truncated" in reason(encoded("PNG")[:-12])
    assert "truncated" in reason(encoded("PNG")[:-2])


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_bytes_after_the_image_are_named_and_padding_is_not(format):
    data = encoded(format)
    assert f"7 bytes follow the end of the {format}" in reason(data + b"surplus")
    assert reason(data + data).startswith(str(len(data)))
    np.testing.assert_array_equal(decode(data + b"\0" * 512), decode(data))


def test_progressive_jpeg_with_thumbnail_ends_where_it_ends():
    exif = Image.Exif()
    exif[0x9286] = b"\xff\xd9 an end mark inside a header"
    data = encoded("JPEG", progressive=True, restart_marker_rows=1, exif=exif)
    assert decode(data).shape == RAMP.shape
    assert "3 bytes follow" in reason(data + b"abc")


def test_phone_jpeg_with_previews_behind_it_is_read():
    data = encoded("MPO", save_all=True, append_images=[Image.fromarray(RAMP)])
    assert data.count(b"\xff\xd9") == 2
    np.testing.assert_array_equal(decode(data), decode(encoded("JPEG")))
