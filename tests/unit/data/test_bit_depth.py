"""16-bit files that use fewer bits: inspect and generate report them, one option fixes them, none is read as black."""

from __future__ import annotations

import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from diffva_ray.cli import main
from diffva_ray.config.recipe import DataConfig
from diffva_ray.data.bit_depth import bit_depth_note, checked_bit_depth
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.images import BadImage, decode, decode_square
from diffva_ray.schema import Status


def encoded(values: np.ndarray, kind: str) -> bytes:
    buffer = BytesIO()
    Image.fromarray(values.astype(np.uint16)).save(buffer, kind)
    return buffer.getvalue()


def narrowed(images: Path, out: Path, bits: int, kind: str = "PNG") -> Path:
    """A copy of the phantoms with ``bits``-bit values in 16-bit files."""
    shutil.copytree(images, out)
    for file in out.glob("*/images/*.png"):
        grey = np.asarray(Image.open(file), np.float64) / 255
        file.write_bytes(encoded(np.round(grey * (2**bits - 1)), kind))
    return out


def diffva(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("bits", [10, 12, 14])
def test_the_option_restores_the_image_without_clipping(bits: int, kind: str) -> None:
    values = np.arange(1 << bits, dtype=np.int64).reshape(-1, 32)
    np.testing.assert_allclose(decode(encoded(values, kind), bits=bits), values / (2**bits - 1), atol=1e-6)
    with pytest.raises(BadImage, match=f"more than {bits} bits"):
        decode(encoded(values + 1, kind), bits=bits)
    eight = np.arange(256, dtype=np.uint8).reshape(16, 16)
    buffer = BytesIO()
    Image.fromarray(eight).save(buffer, "PNG")
    np.testing.assert_array_equal(decode(buffer.getvalue(), bits=bits), decode(buffer.getvalue()))


def test_twelve_bits_read_as_sixteen_are_blank() -> None:
    values = np.linspace(0, 4095, 4096).reshape(64, 64)
    with pytest.raises(BadImage, match=r"data\.bits=12") as caught:
        decode_square(encoded(values, "PNG"), 32)
    assert caught.value.status is Status.BLANK


@pytest.mark.parametrize(("bits", "kind"), [(10, "PNG"), (12, "PNG"), (14, "PNG"), (12, "TIFF")])
def test_the_note_names_the_bits(images: Path, tmp_path: Path, bits: int, kind: str) -> None:
    data = narrowed(images, tmp_path / "data", bits, kind)
    note = bit_depth_note(open_dataset(data))
    assert f"data.bits={bits}" in note
    assert bit_depth_note(open_dataset(data, DataConfig(bits=bits))) == ""
    assert "refused" in bit_depth_note(open_dataset(data, DataConfig(bits=bits - 2)))


def test_full_range_and_eight_bits_need_no_note(images: Path, tmp_path: Path) -> None:
    assert bit_depth_note(open_dataset(images)) == ""
    assert bit_depth_note(open_dataset(narrowed(images, tmp_path / "data", 16))) == ""


@pytest.mark.parametrize("bits", [10, 12, 13, 14])
def test_files_that_clearly_use_fewer_bits_are_refused_until_the_option_says_how_many(
    bits: int, images: Path, model: Path, tmp_path: Path
) -> None:
    """Twelve bits would be nearly black, fourteen too dark; both were computed."""
    data = narrowed(images, tmp_path / "data", bits)
    assert f"use --set data.bits={bits}" in diffva("inspect", data).output
    commands = {
        "run": ("generate", "--data", data, "--model", model, "--out", tmp_path / "run", "--executor", "inline"),
        "dry": ("generate", "--data", data, "--model", model, "--out", tmp_path / "dry", "--dry-run"),
        "trained": ("train", "--data", data, "--out", tmp_path / "trained", "--executor", "inline"),
        "sheet.png": ("explain", next(data.glob("COVID/images/*.png")), "--model", model, "--out",
                      tmp_path / "sheet.png"),
    }  # fmt: skip
    for out, command in commands.items():
        refused = diffva(*command)
        assert refused.exit_code == 2, refused.output
        assert f"use --set data.bits={bits}, or --set data.bits=15" in refused.output
        assert not (tmp_path / out / "plan.parquet").exists()
        assert not list(tmp_path.glob(f"{out}/.train/*"))
    assert checked_bit_depth(open_dataset(data, DataConfig(bits=15))) == ""
    assert checked_bit_depth(open_dataset(data, DataConfig(bits=bits))) == ""


def test_fifteen_bits_are_a_note(images: Path, tmp_path: Path) -> None:
    data = narrowed(images, tmp_path / "data", 15)
    assert "at most 50.0% of the grey scale" in checked_bit_depth(open_dataset(data))


def test_a_file_of_fewer_bits_among_others_is_blank(images: Path, model: Path, tmp_path: Path) -> None:
    """The bits are decided once for the data set, by its brightest files."""
    data = narrowed(images, tmp_path / "data", 16)
    dark = next(data.glob("COVID/images/*.png"))
    dark.write_bytes(encoded(np.asarray(Image.open(dark), np.uint16) >> 4, "PNG"))
    run = ("generate", "--data", data, "--model", model, "--out", tmp_path / "run", "--executor", "inline")
    assert diffva(*run).exit_code == 4
    records = pd.read_parquet(tmp_path / "run" / "records")
    assert set(records[records["image_path"] == str(dark.relative_to(data))]["status"]) == {"blank"}
    assert (records["status"] == "ok").sum() == len(records) - 1


def test_the_option_gives_the_image_of_eight_bits(images: Path, model: Path, tmp_path: Path) -> None:
    data = narrowed(images, tmp_path / "data", 12)

    def generate(source: Path, name: str, *more: str) -> Result:
        return diffva("generate", "--data", source, "--model", model, "--out", tmp_path / name, "--executor", "inline",
                      "--set", "generate.shard_size=2", *more)  # fmt: skip

    fixed = generate(data, "fixed", "--set", "data.bits=12")
    assert fixed.exit_code == 0, fixed.output
    assert generate(images, "eight").exit_code == 0
    twelve, eight = (
        pd.read_parquet(tmp_path / name / "records").set_index("record_id").sort_index() for name in ("fixed", "eight")
    )
    np.testing.assert_allclose(twelve["ssim"], eight["ssim"], atol=0.01)
    differs = generate(data, "fixed")
    assert differs.exit_code == 3
    assert "bits: 12 there, 16 now" in differs.output
