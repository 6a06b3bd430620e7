"""Any bytes become an image in [0, 1] or a BadImage with a reason; attribution maps keep zero."""

from __future__ import annotations

import random
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from dicom_files import dicom
from PIL import Image, ImageFile

from diffva_ray.data import images
from diffva_ray.data.encoding import encode_grey, encode_map, pixel_digest, quantise
from diffva_ray.data.images import BadImage, decode, decode_map, decode_mask, to_square
from diffva_ray.schema import Status

RAMP = np.linspace(0, 255, 24 * 20).reshape(24, 20).astype(np.uint8)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def grey_png(pixels: np.ndarray = RAMP) -> bytes:
    return encoded(Image.fromarray(pixels))


def reason(data: bytes, **limits) -> str:
    with pytest.raises(BadImage) as caught:
        decode(data, **limits)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP"])
def test_lossless_8_bit_grey_is_divided_by_255(format):
    image = decode(encoded(Image.fromarray(RAMP), format))
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image, RAMP.astype(np.float32) / 255)


@pytest.mark.parametrize(
    ("mode", "format"), [("I;16", "PNG"), ("I;16B", "PNG"), ("I;16", "TIFF"), ("I;16B", "TIFF"), ("I", "TIFF")]
)
def test_16_bit_is_scaled_not_clipped(mode, format):
    values = np.array([[0, 255, 256], [40000, 40001, 65535]])
    stored = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    image = decode(encoded(Image.frombytes(mode, (3, 2), values.astype(stored).tobytes()), format))
    np.testing.assert_allclose(image, values / 65535, rtol=1e-6)
    assert image[1, 0] < image[1, 1]


def test_16_bit_tiff_whose_white_is_zero_is_inverted():
    values = np.array([[0, 1000], [2000, 65535]], "<u2")
    tiff = encoded(Image.fromarray(values), "TIFF")
    tag = struct.pack("<HHII", 262, 3, 1, 1)
    assert tag in tiff
    white_is_zero = tiff.replace(tag, struct.pack("<HHII", 262, 3, 1, 0))
    np.testing.assert_allclose(decode(white_is_zero), 1 - values / 65535, atol=1e-6)


def test_wide_integers_and_floats_are_scaled_by_their_own_range():
    wide = decode(encoded(Image.fromarray(np.array([[0, 100_000, 200_000]], np.int32)), "TIFF"))
    np.testing.assert_allclose(wide, [[0, 0.5, 1]])
    bright = decode(encoded(Image.fromarray(np.array([[0, 2, 4]], np.float32)), "TIFF"))
    np.testing.assert_allclose(bright, [[0, 0.5, 1]])
    kept = decode(encoded(Image.fromarray(np.array([[0, 0.25, 0.5]], np.float32)), "TIFF"))
    np.testing.assert_allclose(kept, [[0, 0.25, 0.5]])
    signed = decode(encoded(Image.fromarray(np.array([[-1, 0, 1]], np.float32)), "TIFF"))
    np.testing.assert_allclose(signed, [[0, 0.5, 1]])
    assert "NaN" in reason(encoded(Image.fromarray(np.array([[0, np.nan]], np.float32)), "TIFF"))


@pytest.mark.parametrize(
    ("mode", "format"),
    [("CMYK", "TIFF"), *((mode, format) for mode in ("RGB", "RGBA", "LA", "P", "1") for format in ("PNG", "TIFF"))],
)
def test_every_colour_mode_becomes_luma(mode, format):
    grey = np.where(RAMP > 127, 255, 0).astype(np.uint8) if mode == "1" else RAMP
    original = Image.fromarray(grey)
    image = decode(encoded((original if mode == "P" else original.convert("RGB")).convert(mode), format))
    np.testing.assert_allclose(image, grey / 255, atol=2 / 255)


def test_colour_weights_are_itu_601():
    colours = Image.fromarray(np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8))
    np.testing.assert_allclose(decode(encoded(colours)), [[0.299, 0.587, 0.114]], atol=1 / 255)


def test_cmyk_jpeg_is_not_inverted():
    pixels = np.zeros((32, 32), np.uint8)
    pixels[:16] = 255
    image = decode(encoded(Image.fromarray(pixels).convert("RGB").convert("CMYK"), "JPEG", quality=95))
    assert image[:12].mean() > 0.95
    assert image[20:].mean() < 0.05


def test_palette_is_looked_up():
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([200, 200, 200, 10, 10, 10])
    np.testing.assert_allclose(decode(encoded(palette)), [[200 / 255, 10 / 255]])


def test_alpha_is_dropped():
    transparent = np.dstack([RAMP, np.zeros_like(RAMP)])
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(transparent, "LA"))), RAMP.astype(np.float32) / 255)


@pytest.mark.parametrize(("format", "bits"), [("JPEG", 8), ("PNG", 8), ("PNG", 16), ("TIFF", 8), ("TIFF", 16)])
def test_exif_orientation_is_applied_once(format, bits):
    pixels = np.zeros((16, 32), np.uint8 if bits == 8 else np.uint16)
    pixels[:, :16] = np.iinfo(pixels.dtype).max
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees, clockwise
    image = decode(encoded(Image.fromarray(pixels), format, exif=exif))
    assert image.shape == (32, 16)
    np.testing.assert_allclose(image, np.rot90(pixels, -1) / np.iinfo(pixels.dtype).max, atol=0.05)


def test_empty_files_and_other_formats_are_named():
    assert "empty" in reason(b"")
    assert "not an image" in reason(b"path,label\na.png,COVID\n")
    assert "not an image" in reason(b"\0" * 500)
    assert "not an image" in reason(encoded(Image.fromarray(RAMP), "GIF"))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "BMP"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.7, 0.98])
def test_truncated_files_are_bad(format, part):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), format)
    reason(data[: int(part * len(data))])


def bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_size_is_checked_in_the_header_whatever_pillows_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert "60000 x 60000" in reason(bomb(60_000, 60_000))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert decode(grey_png()).shape == RAMP.shape
    monkeypatch.setattr(images, "MAX_PIXELS", 400)
    assert "at most 400" in reason(grey_png())


def test_small_images_have_their_own_status():
    with pytest.raises(BadImage) as caught:
        decode(grey_png(np.zeros((1, 1), np.uint8)), min_side=32)
    assert caught.value.status is Status.TOO_SMALL
    assert decode(grey_png(), min_side=20).shape == RAMP.shape
    reason(grey_png(), min_side=21)
    assert decode(grey_png(np.full((1, 1), 255, np.uint8))).tolist() == [[1.0]]


def test_dicom_without_pydicom_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    assert "diffva-ray[dicom]" in reason(b"\0" * 128 + b"DICM" + b"\0" * 64)


def test_dicom_without_a_window_and_refused_files():
    values = np.arange(600).reshape(20, 30)
    plain = decode(dicom(values))
    np.testing.assert_allclose(plain, values / 599, atol=2e-3)
    np.testing.assert_allclose(decode(dicom(values, PhotometricInterpretation="MONOCHROME1")), 1 - plain, atol=1e-6)
    assert "pixels; at most" in reason(dicom(values, Rows=60_000, Columns=60_000))
    assert "3 frames" in reason(dicom(values, NumberOfFrames=3))
    reason(dicom(values)[:-100])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("seed", range(4))
def test_no_bytes_raise_another_error_than_bad_image(seed, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    rng = random.Random(seed)
    original = Image.fromarray(RAMP)
    files = [
        grey_png(),
        encoded(original.convert("P"), transparency=0),
        encoded(original, "JPEG"),
        encoded(original, "BMP"),
    ]
    files += [encoded(original, "TIFF", compression=name) for name in ("raw", "tiff_lzw", "tiff_adobe_deflate")]
    files += [b"\0" * 128 + b"DICM" + rng.randbytes(300), rng.randbytes(400)]
    for data in files:
        for _ in range(25):
            damaged = bytearray(data)
            for _ in range(rng.choice([1, 4, 30])):
                damaged[rng.randrange(rng.choice([40, len(data)]))] = rng.randrange(256)
            for read in (decode, images.describe, decode_map, lambda data: decode_mask(data, 8)):
                try:
                    result = read(bytes(damaged[: rng.choice([len(data), rng.randrange(len(data))])]))
                except BadImage:
                    continue
                if read is decode:
                    assert result.dtype == np.float32
                    assert result.ndim == 2
                    assert 0 <= result.min() <= result.max() <= 1


def test_memory_error_is_a_bad_image(monkeypatch):
    def exhausted(image):
        raise MemoryError

    monkeypatch.setattr(images, "_grey", exhausted)
    assert "memory" in reason(grey_png())


def test_describe_names_format_and_depth():
    assert images.describe(grey_png()) == "PNG grey 8-bit"
    assert images.describe(grey_png(RAMP.astype(np.uint16))) == "PNG grey 16-bit"
    assert images.describe(encoded(Image.fromarray(RAMP).convert("CMYK"), "JPEG")) == "JPEG CMYK 8-bit"


def test_to_square_squashes_with_antialiasing():
    stripes = np.tile(np.array([0, 1], np.float32), (60, 60))  # finer than the pixels of the target
    small = to_square(stripes, 16)
    assert small.shape == (16, 16)
    assert small.dtype == np.float32
    np.testing.assert_allclose(small, 0.5, atol=0.1)
    edge = np.zeros((30, 50), np.float32)
    edge[:, 25:] = 1
    larger = to_square(edge, 64)
    assert larger.min() >= 0
    assert larger.max() <= 1
    np.testing.assert_array_equal(to_square(edge[:30, :30], 30), edge[:30, :30])


def test_grey_round_trip():
    values = np.arange(256, dtype=np.float32).reshape(16, 16) / 255
    pixels = quantise(values)
    np.testing.assert_array_equal(pixels.ravel(), np.arange(256))
    np.testing.assert_array_equal(quantise(np.array([-0.5, 1.5])), [0, 255])
    np.testing.assert_array_equal(decode(encode_grey(pixels)), values)
    assert encode_grey(pixels) == encode_grey(pixels.copy())
    with pytest.raises(ValueError, match="uint8"):
        encode_grey(values)


def test_map_round_trip_keeps_zero_and_sign():
    rng = np.random.default_rng(0)
    signed = rng.uniform(-1, 1, (32, 48)).astype(np.float32)
    signed[:4] = 0
    signed[4, :3] = -1, 1, 1e-9
    data = encode_map(signed)
    again = decode_map(data)
    assert again.dtype == np.float32
    assert (again[:4] == 0).all()
    assert again[4, :3].tolist() == [-1, 1, 0]
    np.testing.assert_allclose(again, signed, atol=0.5 / 32767 + 1e-7)
    assert encode_map(again) == data
    stored = np.asarray(Image.open(BytesIO(data)))
    assert stored[0, 0] == 32768
    assert stored[4, 0] == 1
    assert decode_map(encode_map(np.array([[2.0, -3.0]]))).tolist() == [[1, -1]]
    with pytest.raises(BadImage, match="PNG grey 8-bit"):
        decode_map(grey_png())


def test_read_map_reads_a_file(tmp_path):
    (tmp_path / "map.png").write_bytes(encode_map(np.full((2, 2), 0.5)))
    np.testing.assert_allclose(images.read_map(str(tmp_path / "map.png")), 0.5, atol=1e-4)
    with pytest.raises(FileNotFoundError):
        images.read_map(str(tmp_path / "none.png"))


def test_masks_are_above_half_and_stay_binary():
    mask = np.zeros((8, 8), np.uint8)
    mask[:4], mask[4] = 255, 127
    decoded = decode_mask(grey_png(mask), 16)
    assert decoded.dtype == bool
    assert decoded[:8].all()
    assert not decoded[8:].any()
    sixteen = decode_mask(grey_png((mask > 0).astype(np.uint16) * 65535), 8)
    np.testing.assert_array_equal(sixteen, mask > 0)
    assert not decode_mask(grey_png(np.zeros((8, 8), np.uint8)), 8).any()


def test_mask_of_zeros_and_ones_is_refused_rather_than_empty():
    with pytest.raises(BadImage, match="white"):
        decode_mask(grey_png(np.eye(8, dtype=np.uint8)), 8)


def test_pixel_digest_is_of_type_shape_and_values():
    pixels = RAMP.copy()
    base = pixel_digest(pixels)
    assert pixel_digest(np.asfortranarray(pixels)) == base
    others = [pixels.T, pixels.astype(np.float32), pixels.ravel(), pixels + 1]
    assert len({base, *map(pixel_digest, others)}) == 5
    assert pixel_digest(pixels.astype(">u2")) == pixel_digest(pixels.astype("<u2"))
