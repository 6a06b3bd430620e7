"""Explaining one image: equal pixels and metrics as a run, the sheet, and one-line errors."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from dicom_files import dicom
from PIL import Image

from diffva_ray.cli import main
from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.data.dataset import UnusableData
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.encoding import encode_grey, quantise
from diffva_ray.data.images import decode, to_square
from diffva_ray.evaluate.drawing import png
from diffva_ray.explain.image import Explanation, explain
from diffva_ray.explain.interpolate import interpolate
from diffva_ray.explain.sheet import sheet, write_sheet
from diffva_ray.model.recipe import model_recipe
from diffva_ray.schema import RECORDS, record_seed

HEALTHY = "normal chest scan"
PROMPTS = (HEALTHY, "COVID 19")


def diffva(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def image(images: Path) -> Path:
    return sorted((images / "COVID" / "images").iterdir())[0]


@pytest.fixture(scope="module")
def explanation(image: Path, model: Path) -> Explanation:
    return explain(str(image), str(model), model_recipe(str(model), None, ()), PROMPTS, "cpu")


def test_a_run_of_the_same_image_has_the_same_pixels_and_numbers(image: Path, model: Path, tmp_path: Path) -> None:
    shutil.copy(image, tmp_path / image.name)
    (tmp_path / "images.csv").write_text(f"path,label\n{image.name},COVID\n")
    settings = ("--model", model, "--strength", 0.7, "--seed", 5, "--prompt", HEALTHY)
    data = ("--data", tmp_path / "images.csv", "--out", tmp_path / "run", "--executor", "inline")
    assert diffva("generate", *data, *settings).exit_code == 0
    record = pd.read_parquet(tmp_path / "run" / "records" / "part-00000.parquet").to_dict("records")[0]
    sheet_path = tmp_path / "sheet.png"
    result = diffva("explain", tmp_path / image.name, *settings, "--json", "--out", sheet_path)
    assert result.exit_code == 0, result.output
    explained = json.loads(result.output)
    answer = explained["answers"][0]
    shared = (set(answer) | {"seed", "model_digest", "image_sha256", "width", "height"}) & set(RECORDS.names)
    assert {
        "ssim",
        "ms_ssim",
        "ms_ssim_scales",
        "psnr",
        "l1",
        "attribution_energy",
        "counterfactual_sha256",
        "attribution_sha256",
    } <= shared
    for name in shared:
        ours, theirs = {**explained, **answer}[name], record[name]
        assert ours == theirs or (ours is None and theirs != theirs) or (ours is theirs), name


def test_the_seed_depends_on_the_file_name(image: Path, model: Path, explanation: Explanation) -> None:
    engine = CounterfactualEngine.from_pretrained(str(model), "cpu")
    square = to_square(decode(image.read_bytes()), engine.size)
    counterfactuals = engine([square], [record_seed(0, image.name, 0)], [HEALTHY])
    np.testing.assert_array_equal(explanation.answers[0].counterfactual, quantise(counterfactuals.counterfactuals[0]))


def test_prompts_share_the_image_and_keep_their_order(explanation: Explanation) -> None:
    assert [answer.prompt for answer in explanation.answers] == list(PROMPTS)
    first, second = explanation.answers
    assert not np.array_equal(first.counterfactual, second.counterfactual)
    assert first.numbers["judge_image"] == second.numbers["judge_image"]
    assert first.numbers["source_prompt"] == second.numbers["source_prompt"]


def test_prompts_beyond_a_micro_batch_give_the_same_numbers(image: Path, model: Path, explanation: Explanation) -> None:
    recipe = model_recipe(str(model), None, ())
    prompts = [*(f"scan {n}" for n in range(recipe.generate.micro_batch)), *PROMPTS]
    result = explain(str(image), str(model), recipe, prompts, "cpu")
    assert len(result.answers) == len(prompts)
    assert [answer.numbers for answer in result.answers[-2:]] == [answer.numbers for answer in explanation.answers]


def test_the_json_has_provenance_and_metrics(explanation: Explanation) -> None:
    result = json.loads(json.dumps(explanation.as_dict(), allow_nan=False))
    assert {
        "image",
        "model",
        "model_digest",
        "settings",
        "seed",
        "run_seed",
        "code_revision",
        "recipe",
    } <= result.keys()
    assert {"prompt", "source_prompt", "ssim", "ms_ssim", "ms_ssim_scales", "psnr", "l1", "attribution_energy",
            "judge_image", "judge_counterfactual"} <= result["answers"][0].keys()  # fmt: skip
    assert 0 <= result["answers"][0]["attribution_energy_lung_fraction"] <= 1


def test_masks_beside_the_image_are_found(explanation: Explanation, image: Path, model: Path, tmp_path: Path) -> None:
    assert explanation.lungs is not None
    assert explanation.lesion is not None
    shutil.copy(image, tmp_path / image.name)
    alone = explain(str(tmp_path / image.name), str(model), model_recipe(str(model), None, ()), (), "cpu")
    assert (alone.lungs, alone.lesion) == (None, None)
    assert alone.answers[0].numbers["attribution_energy_lung_fraction"] is None
    np.testing.assert_array_equal(alone.answers[0].counterfactual, explanation.answers[0].counterfactual)


def test_masks_of_a_data_set_with_a_folder_per_class_are_found(image: Path, model: Path, tmp_path: Path) -> None:
    """COVID/x.png and COVID/masks/x.png, by the rules of ``generate``; some methods' pixels depend on the masks."""
    folder = tmp_path / "COVID"
    folder.mkdir()
    shutil.copy(image, folder / image.name)
    for kind in ("masks", "lesions"):
        shutil.copytree(image.parents[1] / kind, folder / kind)
    (copy,) = open_dataset(str(tmp_path)).images
    assert copy.lung_mask == f"COVID/masks/{image.name}"
    lungs = ("generate.method=masked", "generate.masked.source=lungs")
    recipe = model_recipe(str(model), None, lungs)
    copied = explain(str(folder / image.name), str(model), recipe, (HEALTHY,), "cpu")
    original = explain(str(image), str(model), recipe, (HEALTHY,), "cpu")
    np.testing.assert_array_equal(copied.lungs, original.lungs)
    np.testing.assert_array_equal(copied.answers[0].counterfactual, original.answers[0].counterfactual)
    strip = interpolate(str(image), str(model), recipe, (HEALTHY, "COVID 19"), frames=2, device="cpu")
    np.testing.assert_array_equal(quantise(strip.images[0]), original.answers[0].counterfactual)


def test_a_path_relative_to_the_class_folder_has_its_masks(
    explanation: Explanation, image: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(image.parents[1])
    result = explain(f"images/{image.name}", str(model), model_recipe(str(model), None, ()), (), "cpu")
    np.testing.assert_array_equal(result.lesion, explanation.lesion)


def test_the_sheet_has_a_row_for_each_prompt(explanation: Explanation, tmp_path: Path) -> None:
    write_sheet(explanation, str(tmp_path / "deep" / "sheet.png"))
    drawn = Image.open(tmp_path / "deep" / "sheet.png")
    single = Explanation(explanation.image, None, None, explanation.answers[:1], explanation.about)
    shorter = Image.open(io.BytesIO(png(sheet(single))))
    assert drawn.width == shorter.width > 1500
    assert drawn.height - shorter.height > 350
    assert np.asarray(drawn.convert("L")).std() > 10
    assert png(sheet(single)) == png(sheet(single))


def test_prompts_with_dollar_signs_are_drawn_literally(explanation: Explanation) -> None:
    from dataclasses import replace

    odd = replace(explanation.answers[0], prompt="$\\frac{ <b> " + "long " * 60)
    assert png(sheet(replace(explanation, answers=[odd], about={**explanation.about, "image": "$x_{/" * 40})))


@pytest.mark.parametrize(("ending", "start"), [("pdf", b"%PDF"), ("SVG", b"<?xml")])
def test_a_sheet_is_of_the_kind_that_its_name_says(
    explanation: Explanation, tmp_path: Path, ending: str, start: bytes
) -> None:
    write_sheet(explanation, str(tmp_path / f"sheet.{ending}"))
    assert (tmp_path / f"sheet.{ending}").read_bytes().startswith(start)
    with pytest.raises(UnusableData, match=r"x\.jpg: the sheet is a \.png, \.pdf, \.svg file"):
        write_sheet(explanation, str(tmp_path / "x.jpg"))


def test_a_header_gives_sides_view_and_scale_bar(model: Path, tmp_path: Path) -> None:
    """The image is 64 pixels of 5 mm wide: a bar of 5 cm is 10 of them."""
    pixels = np.random.default_rng(0).integers(0, 4096, (48, 64)).astype(np.uint16)
    (tmp_path / "x.dcm").write_bytes(dicom(pixels, ViewPosition="PA", PixelSpacing=[5.5, 5]))
    made = explain(str(tmp_path / "x.dcm"), str(model), model_recipe(str(model), None, ()), (), "cpu")
    assert (made.about["view"], made.about["spacing"]) == ("PA", "5.5/5.0")
    axes = sheet(made).axes[0]
    assert {text.get_text() for text in axes.texts} == {"R", "L", "PA", "5 cm"}
    (bar,) = axes.lines
    assert np.ptp(bar.get_xdata()) == pytest.approx(10 / 64)


def test_the_sheet_goes_to_the_current_folder(
    image: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = diffva("explain", image, "--model", model, "--steps", 4)
    assert result.exit_code == 0
    assert f"sheet in {image.stem}.explained.png" in result.output
    assert "Not for clinical use" in result.output
    assert [path.name for path in tmp_path.iterdir()] == [f"{image.stem}.explained.png"]


def test_dry_run_writes_nothing(image: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = json.loads(diffva("explain", image, "--model", model, "--strength", 0.4, "--dry-run").output)
    assert plan["recipe"]["generate"]["strength"] == 0.4
    assert plan["prompts"] == [HEALTHY]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("{tmp}/none.png",), "none.png: no such file"),
        (("{tmp}",), "a folder"),
        (("{tmp}/text.png",), "text.png: not an image"),
        (("{tmp}/small.png",), "too small"),
        (("gopher://a/b.png",), "gopher"),
        (("{image}", "--method", "magic"), "magic"),
        (("{image}", "--strength", 1.7), "generate.strength"),
        (("{image}", "--strength", 0.01), "no step"),
        (("{image}", "--scheduler", "pndm"), "--scheduler ddim"),
        (("{image}", "--prompt", "far too long " * 30), "tokens"),
        (("{image}", "--out", "{tmp}/sheet.jpg"), "sheet.jpg"),
        (("{image}", "--model", "{tmp}"), "diffva.json"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], named: str, image: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "small.png").write_bytes(encode_grey(np.zeros((8, 8), np.uint8)))
    filled = [str(text).replace("{tmp}", str(tmp_path)).replace("{image}", str(image)) for text in arguments]
    result = diffva("explain", "--model", model, *filled)
    assert result.exit_code == 2, result.output
    assert named in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_too_many_prompts_for_a_sheet_are_refused(image: Path, model: Path) -> None:
    with pytest.raises(UnusableData, match="room"):
        explain(str(image), str(model), model_recipe(str(model), None, ()), [f"scan {n}" for n in range(99)])
