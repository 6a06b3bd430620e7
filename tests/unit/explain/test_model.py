"""A model in a notebook: ``load`` and ``generate`` for whatever an image may be."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import diffva_ray as dv
from diffva_ray.cli import main
from diffva_ray.explain.image import explain
from diffva_ray.explain.model import Model
from diffva_ray.explain.results import Results
from diffva_ray.model.recipe import model_recipe


@pytest.fixture(scope="module")
def loaded(model: Path) -> Model:
    return dv.load(model, "cpu")


@pytest.fixture(scope="module")
def files(images: Path) -> list[Path]:
    return sorted((images / "COVID" / "images").iterdir())


def test_a_file_has_the_result_of_explain(loaded: Model, model: Path, files: list[Path]) -> None:
    result = loaded.generate(files[0])
    expected = explain(str(files[0]), str(model), model_recipe(str(model), None, ()), device="cpu").answers[0]
    assert np.array_equal(np.round(result.counterfactual * 255), expected.counterfactual)
    assert np.array_equal(result.attribution, expected.signed_map)
    assert result.metrics == {"image": str(files[0]), **expected.numbers}


def test_any_number_of_images_in_their_order(loaded: Model, files: list[Path]) -> None:
    """More than a micro-batch; each as if it were alone."""
    assert len(files) > loaded.engine.config.micro_batch
    results = loaded.generate((file for file in files), "COVID 19")
    assert isinstance(results, Results)
    assert list(results.metrics["image"]) == [str(file) for file in files]
    assert set(results.metrics["prompt"]) == {"COVID 19"}
    assert results.counterfactuals.shape == results.attributions.shape == (len(files), 32, 32)
    alone = loaded.generate(str(files[-1]), "COVID 19")
    assert np.array_equal(results[-1].counterfactual, alone.counterfactual)
    assert [result.metrics["image"] for result in results[1:3]] == [str(file) for file in files[1:3]]
    assert len(loaded.generate([])) == 0


def test_a_path_and_the_arrays_of_its_pixels_are_the_same_image(loaded: Model, files: list[Path]) -> None:
    opened = Image.open(files[0])
    grey, floats = np.asarray(opened), dv.read_image(str(files[0]))
    forms: list[Any] = [
        opened, opened.convert("RGB"), grey, np.stack([grey] * 3, -1), grey.astype(np.uint16) * 257, floats,
        floats.astype(np.float64), torch.from_numpy(floats)[None],
    ]  # fmt: skip
    expected = loaded.generate(files[0])
    for result in loaded.generate(forms):
        assert np.allclose(result.image, expected.image, atol=1e-6)
    turned = opened.copy()
    exif = turned.getexif()
    exif[0x0112] = 3  # upside down
    turned.info["exif"] = exif.tobytes()
    assert np.allclose(loaded.generate(turned).image, expected.image[::-1, ::-1], atol=1e-6)


def test_a_result_shows_itself(loaded: Model, files: list[Path], tmp_path: Path) -> None:
    result = loaded.generate(files[0])
    assert Image.open(io.BytesIO(result._repr_png_())).width > 500
    result.save(str(tmp_path / "sheet.png"))
    assert (tmp_path / "sheet.png").read_bytes() == result._repr_png_()
    assert files[0].name in repr(result)
    assert "SSIM" in repr(result)
    assert "Not for clinical use" in repr(result)
    assert repr(loaded.generate(files[:2])).startswith("2 results")
    assert "classes COVID, Lung_Opacity, Normal, Viral Pneumonia" in repr(loaded)


GREY = np.full((40, 40), 0.5, np.float32)
WRONG: list[tuple[Any, Any, type[Exception], str]] = [
    (None, None, TypeError, "an image is a path, a PIL image, a numpy array or a torch tensor, got NoneType"),
    ([GREY, 7], None, TypeError, "image 1: an image is a path, .* got int"),
    (GREY * 255, None, ValueError, r"image 0: values are in \[0, 1\], got 127.5 to 127.5; divide 8-bit ones by 255"),
    ([GREY] * 5 + [GREY * 3], None, ValueError, "image 5: values are in"),
    (np.stack([GREY] * 3, -1), None, ValueError, r"an image is a float array \[H, W\].* got float32 \[40, 40, 3\]"),
    (GREY > 0, None, ValueError, "got bool"),
    (np.zeros((3, 40, 40), np.uint8), None, TypeError, r"image 0: uint8 \[3, 40, 40\] is no image"),
    ("absent.png", None, ValueError, "absent.png: no such file"),
    (GREY, ["a", "b"], TypeError, "prompt is one text for all images, got list"),
    (GREY, "mild " * 40, ValueError, "more than the 16 tokens that this model reads"),
]


@pytest.mark.parametrize(("given", "prompt", "kind", "message"), WRONG, ids=[message[:30] for *_, message in WRONG])
def test_what_is_no_image_is_said(loaded: Model, given: Any, prompt: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        loaded.generate(given, prompt)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model found"):
        dv.load(tmp_path)


def test_a_run_gives_records_and_images(images: Path, model: Path, tmp_path: Path) -> None:
    command = f"generate --data {images} --model {model} --out {tmp_path / 'run'} --limit 8 --executor inline"
    assert CliRunner().invoke(main, command.split()).exit_code == 0
    run = dv.open_run(tmp_path / "run")
    records = run.records()
    assert len(run) == len(records) == len(list(run)) == 8
    assert next(iter(run))["record_id"] == records["record_id"][0]
    assert run.images(records.iloc[3]).counterfactual.shape == (32, 32)
    assert "8 records, 2 of 2 shards committed; recipe tiny" in repr(run)


def test_a_data_set_is_a_collection_of_images(images: Path) -> None:
    dataset = dv.open_dataset(images)
    assert len(dataset) == len(list(dataset)) == 24
    assert "24 images; classes COVID 6, Lung_Opacity 6" in repr(dataset)
