"""DICOM pixels: the file's window and tables are applied; neither padding nor a hot pixel changes the scaling."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_files import dicom

from diffva_ray.data.images import BadImage, decode, decode_square, decode_with_columns
from diffva_ray.data.phantoms import phantom
from diffva_ray.schema import Status

SIDE = 64


@pytest.fixture(scope="module")
def tissue() -> np.ndarray:
    """A phantom as 12-bit values, 400 to 3200."""
    image = phantom("COVID", 0, 1, SIDE).image
    return np.round(400 + 2800 * (image - image.min()) / np.ptp(image)).astype(np.int64)


def bordered(values: np.ndarray, padding: int) -> np.ndarray:
    padded = values.copy()
    padded[:2] = padded[-2:] = padding
    padded[:, :2] = padded[:, -2:] = padding
    return padded


INSIDE = (slice(2, -2), slice(2, -2))


@pytest.mark.parametrize(
    ("padding", "declared"),
    [
        (65535, {"PixelPaddingValue": 65535}),
        (0, {"PixelPaddingValue": 0}),
        (65000, {"PixelPaddingValue": 64000, "PixelPaddingRangeLimit": 65535}),
        (65000, {"PixelPaddingValue": 65535, "PixelPaddingRangeLimit": 64000}),
        (4000, {"PixelPaddingValue": 4000, "RescaleSlope": 2, "RescaleIntercept": -1024}),
        (65535, {"PixelPaddingValue": 65535, "WindowCenter": 1800, "WindowWidth": 2800}),
    ],
)
@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_declared_padding_is_black_and_does_not_change_the_scaling(
    tissue: np.ndarray, padding: int, declared: dict[str, Any], photometric: str
) -> None:
    others = {key: value for key, value in declared.items() if not key.startswith("PixelPadding")}
    plain = decode(dicom(tissue[INSIDE], PhotometricInterpretation=photometric, **others))
    grey = decode(dicom(bordered(tissue, padding), PhotometricInterpretation=photometric, **declared))
    np.testing.assert_allclose(grey[INSIDE], plain, atol=1e-6)
    outline = np.ones(grey.shape, bool)
    outline[INSIDE] = False
    assert (grey[outline] == 0).all()


@pytest.mark.parametrize("written", [-32768, 32768])
def test_padding_of_signed_pixels_with_and_without_its_sign(tissue: np.ndarray, written: int) -> None:
    signed = tissue - 2000
    plain = decode(dicom(signed[INSIDE]))
    data = dicom(bordered(signed, -32768), PixelPaddingValue=-32768)
    if written > 0:  # some devices write it unsigned: the same two bytes with VR US
        assert data.count(b"\x28\x00\x20\x01SS") == 1
        data = data.replace(b"\x28\x00\x20\x01SS", b"\x28\x00\x20\x01US")
    np.testing.assert_allclose(decode(data)[INSIDE], plain, atol=1e-6)


def test_a_window_is_applied_and_never_stretched(tissue: np.ndarray) -> None:
    narrow = np.clip(tissue, 1500, 2523)
    grey = decode(dicom(narrow, WindowCenter=2048, WindowWidth=2048))
    assert grey.min() == pytest.approx((1500 - 1024) / 2048, abs=2e-3)
    assert grey.max() == pytest.approx((2523 - 1024) / 2048, abs=2e-3)
    first = decode(dicom(narrow, WindowCenter=[2048, 100], WindowWidth=[2048, 10]))
    np.testing.assert_array_equal(first, grey)
    inverted = decode(dicom(narrow, WindowCenter=2048, WindowWidth=2048, PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_allclose(inverted, 1 - grey, atol=1e-6)
    sigmoid = decode(dicom(narrow, WindowCenter=2048, WindowWidth=2048, VOILUTFunction="SIGMOID"))
    assert sigmoid.max() == pytest.approx(1 / (1 + np.exp(-4 * (2523 - 2048) / 2048)), abs=2e-3)


def test_a_window_without_width_is_ignored(tissue: np.ndarray) -> None:
    np.testing.assert_array_equal(decode(dicom(tissue, WindowCenter=0, WindowWidth=0)), decode(dicom(tissue)))


def test_a_lookup_table_is_scaled_by_its_own_range(tissue: np.ndarray) -> None:
    from pydicom.dataset import Dataset

    table = Dataset()
    entries = np.linspace(0, 1023, 4096).round().astype("<u2")  # ten bits of output, as 16-bit entries
    table.LUTDescriptor, table.LUTData = [4096, 0, 16], entries.tobytes()
    narrow = np.clip(tissue, 1024, 3071)
    grey = decode(dicom(narrow, VOILUTSequence=[table]))
    np.testing.assert_allclose(grey, narrow / 4095, atol=2e-3)


def test_a_hot_pixel_does_not_darken_the_rest(tissue: np.ndarray) -> None:
    hot = tissue.copy()
    hot[0, 0] = 65535
    assert np.abs(decode(dicom(hot)) - decode(dicom(tissue))).ravel()[1:].max() < 0.01


@pytest.mark.parametrize(
    "declared", [{"WindowCenter": 40000, "WindowWidth": 100}, {"PixelPaddingValue": 0, "PixelPaddingRangeLimit": 65535}]
)
def test_an_image_without_contrast_is_blank(tissue: np.ndarray, declared: dict[str, Any]) -> None:
    data = dicom(tissue, **declared)
    with pytest.raises(BadImage, match="window off its values") as caught:
        decode_square(data, 32)
    assert caught.value.status is Status.BLANK


def test_an_image_of_black_and_white_only_is_blank(tissue: np.ndarray) -> None:
    with pytest.raises(BadImage, match="100% of the pixels are black or white") as caught:
        decode_square(dicom(tissue, WindowCenter=1800, WindowWidth=1), 32)
    assert caught.value.status is Status.BLANK


def test_colours_are_not_stretched() -> None:
    values = np.full((8, 8, 3), (50, 100, 150), np.uint8)
    data = dicom(
        np.zeros((8, 8)), PhotometricInterpretation="RGB", SamplesPerPixel=3, PlanarConfiguration=0, BitsAllocated=8,
        BitsStored=8, HighBit=7, PixelData=values.tobytes(),
    )  # fmt: skip
    np.testing.assert_allclose(decode(data), (0.299 * 50 + 0.587 * 100 + 0.114 * 150) / 255, atol=1e-6)


def test_a_range_of_padding_in_signed_pixels_at_either_end(tissue: np.ndarray) -> None:
    signed = tissue - 2000
    plain = {
        name: decode(dicom(signed[INSIDE], PhotometricInterpretation=name)) for name in ("MONOCHROME1", "MONOCHROME2")
    }
    for value, limit in ((-32768, -32000), (-32000, -32768), (32767, 32000)):
        for name, expected in plain.items():
            data = dicom(bordered(signed, (value + limit) // 2), PixelPaddingValue=value, PixelPaddingRangeLimit=limit,
                         PhotometricInterpretation=name)  # fmt: skip
            grey = decode(data)
            np.testing.assert_allclose(grey[INSIDE], expected, atol=1e-6)
            assert (grey[0] == 0).all()


def test_several_frames_are_refused(tissue: np.ndarray) -> None:
    data = dicom(tissue, NumberOfFrames=3)
    with pytest.raises(BadImage, match="a DICOM file of 3 frames"):
        decode(data)


def test_a_file_without_preamble_and_meta_information_is_read(tissue: np.ndarray) -> None:
    import pydicom

    image = pydicom.dcmread(BytesIO(dicom(tissue, Modality="DX")))
    for implicit in (True, False):
        buffer = BytesIO()
        pydicom.dcmwrite(buffer, pydicom.Dataset(image), implicit_vr=implicit, little_endian=True)
        assert buffer.getvalue()[128:132] != b"DICM"
        np.testing.assert_array_equal(decode(buffer.getvalue()), decode(dicom(tissue)))
    with pytest.raises(BadImage, match="damaged"):
        decode(b"\x08\0\x05\0 this is no DICOM file")


def compressed(data: bytes, syntax: str, folder: Path) -> bytes:
    """The file in another transfer syntax, written by gdcm."""
    gdcm = pytest.importorskip("gdcm", reason="the codecs of extra dicom are not installed")
    (folder / "plain.dcm").write_bytes(data)
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(folder / "plain.dcm"))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFileName(str(folder / "packed.dcm"))
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    assert writer.Write()
    return (folder / "packed.dcm").read_bytes()


@pytest.mark.parametrize("values", ["unsigned", "signed"])
@pytest.mark.parametrize(
    "syntax", ["JPEGLosslessProcess14_1", "JPEGLosslessProcess14", "JPEGLSLossless", "JPEG2000Lossless", "RLELossless"]
)
def test_compressed_files_are_decoded(tissue: np.ndarray, syntax: str, values: str, tmp_path: Path) -> None:
    plain = dicom(tissue - 2000 * (values == "signed"))
    packed = compressed(plain, syntax, tmp_path)
    np.testing.assert_array_equal(decode(packed), decode(plain))


def test_a_missing_codec_is_named(tissue: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    from pydicom.encaps import encapsulate
    from pydicom.pixels.decoders import JPEGLosslessSV1Decoder
    from pydicom.uid import JPEGLosslessSV1

    monkeypatch.setattr(JPEGLosslessSV1Decoder, "_available", {})
    data = dicom(tissue, PixelData=encapsulate([b"\xff\xd8\xff\xd9"]), syntax=JPEGLosslessSV1)
    with pytest.raises(BadImage, match=r"gdcm is needed for DICOM files in JPEG Lossless.*pip install .*\[dicom\]"):
        decode(data)


def test_the_header_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsing takes as long as decoding the pixels of a small file."""
    from diffva_ray.data import dicom as module

    parsed = []
    opened = module.opened
    monkeypatch.setattr(module, "opened", lambda data: parsed.append(len(data)) or opened(data))
    data = dicom(np.arange(64 * 64).reshape(64, 64), ViewPosition="PA")
    square, shape, columns = decode_with_columns(data, 32)
    assert (square.shape, shape, columns["view"]) == ((32, 32), (64, 64), "PA")
    assert parsed == [len(data)]
