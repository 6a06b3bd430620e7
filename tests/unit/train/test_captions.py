"""An image's caption, or one made of what the data set says, replaces its class's prompt in training."""

from __future__ import annotations

import csv
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from trainings import different, killed, run, weights, with_stages

from diffva_ray.config.recipe import Recipe, RecipeError, make_recipe
from diffva_ray.data.dataset import LabelledImage
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.factor_phantoms import factor_set
from diffva_ray.model.bundle import build, save
from diffva_ray.model.card import read_card
from diffva_ray.storage.local import LocalStore
from diffva_ray.train.denoiser import DenoiserStage
from diffva_ray.train.sampling import ImageSet, step_generator
from diffva_ray.train.stage import Batch, StageContext
from diffva_ray.workflows.train import training_keys

STAGE = {"name": "joint", "trains": "denoiser", "steps": 2, "batch_size": 4, "learning_rate": 1e-3}


@pytest.fixture
def captioned(images: Path, tmp_path: Path) -> Callable[[Callable[[LabelledImage], str]], Path]:
    """A manifest of the images with captions."""
    shutil.copytree(images, tmp_path / "images")

    def write(caption: Callable[[LabelledImage], str]) -> Path:
        manifest = tmp_path / "images" / "captions.csv"
        with open(manifest, "w", newline="") as file:
            csv.writer(file).writerows(
                [("path", "label", "caption")]
                + [(image.path, image.label, caption(image)) for image in open_dataset(images).images]
            )
        return manifest

    return write


def test_captions_replace_the_class_prompts(tiny: Recipe, images: Path, captioned: Callable, tmp_path: Path) -> None:
    recipe = with_stages(tiny, STAGE)
    run(recipe, images, tmp_path / "classes")
    for name, caption in {
        "same": lambda image: recipe.data.prompt(image.label),
        "none": lambda image: "",
        "other": lambda image: f"mild {recipe.data.prompt(image.label)}",
    }.items():
        run(recipe, captioned(caption), tmp_path / name)
    expected = weights(tmp_path / "classes", "unet", "text_encoder")
    assert different(expected, weights(tmp_path / "same", "unet", "text_encoder")) == []
    assert different(expected, weights(tmp_path / "none", "unet", "text_encoder")) == []
    assert len(different(expected, weights(tmp_path / "other", "unet", "text_encoder"))) > 10


def test_pairs_ask_for_what_the_caption_says(tiny: Recipe, captioned: Callable, tmp_path: Path) -> None:
    """Where a lesion is to be added, the prompt is the image's caption, which says where; even if it was dropped."""
    manifest = captioned(lambda image: "" if image.label == "Normal" else "covid 19 mild")
    recipe = with_stages(tiny, {**STAGE, "pairs": 1.0, "prompt_dropout": 0.9})
    images = ImageSet(open_dataset(str(manifest)), 32)
    stage = DenoiserStage(StageContext(build(recipe), images, 0, LocalStore(str(tmp_path))), recipe.train.stages[0])
    inputs = stage.inputs(Batch(0, 64, list(range(64)), step_generator(0, "joint", 0)))
    ids, _, which = inputs["tokens"]
    texts = [stage.context.bundle.tokenizer.decode(ids[n], skip_special_tokens=True) for n in which]
    edits = inputs["edits"]
    shows, asks = (edits[name].flatten().tolist() for name in ("shows_truth", "asks_truth"))
    rows = edits["rows"].tolist()
    assert {texts[row] for row, adds in zip(rows, shows, strict=True) if adds} == {"covid 19 mild"}
    assert {texts[row] for row, removes in zip(rows, asks, strict=True) if removes} == {"normal chest scan"}
    assert {texts[row] for row, *any_ in zip(rows, shows, asks, strict=True) if not any(any_)} == {""}


def test_another_caption_is_another_training(tiny: Recipe, captioned: Callable) -> None:
    _, mild, _ = training_keys(tiny, str(captioned(lambda image: "mild")))
    _, severe, _ = training_keys(tiny, str(captioned(lambda image: "severe")))
    assert mild != severe


def test_captions_that_are_too_long_are_logged(
    tiny: Recipe, captioned: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = captioned(lambda image: "mild " * 30 if image.label == "COVID" else "normal")
    with caplog.at_level(logging.WARNING, "diffva_ray"):
        run(with_stages(tiny, STAGE), long, tmp_path / "long")
    assert "1 captions are longer than 16 tokens" in caplog.text


def test_a_text_encoder_that_lost_the_words_is_reported(
    tiny: Recipe, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One whose output no longer depends on the words, as a training on captions at a high learning rate leaves it."""
    with caplog.at_level(logging.WARNING, "diffva_ray"):
        run(with_stages(tiny, STAGE), images, tmp_path / "sound")
    assert "the same embedding" not in caplog.text
    bundle = build(tiny)
    with torch.no_grad():
        bundle.text_encoder.encoder.layer[-1].output.LayerNorm.weight.zero_()
        bundle.text_encoder.encoder.layer[-1].output.LayerNorm.bias.fill_(1)
    save(bundle, LocalStore(str(tmp_path / "base")), {})
    values = with_stages(tiny, {**STAGE, "learning_rate": 1e-6}).model_dump(mode="json")
    values["model"] |= {"base": str(tmp_path / "base"), "vae": None, "unet": None, "text": None}
    with caplog.at_level(logging.WARNING, "diffva_ray"):
        run(make_recipe(values), images, tmp_path / "lost")
    assert "stage joint: the text encoder gives all prompts the same embedding" in caplog.text


@pytest.fixture(scope="module")
def factors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("factors")
    list(factor_set(LocalStore(str(folder)), 16, 32, seed=5))
    return folder / "factors.csv"


def told(recipe: Recipe, **captions: object) -> Recipe:
    """The recipe with captions from data, and room for them."""
    values = with_stages(recipe, {**STAGE, "steps": 3}).model_dump(mode="json")
    values["data"]["captions"] = captions
    values["model"]["tokenizer_length"] = 80
    return make_recipe(values)


def test_a_training_with_captions_from_data_resumes_exactly(
    tiny: Recipe, factors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = told(tiny)
    values = recipe.model_dump(mode="json")
    values["train"]["checkpoint_every"] = 1
    recipe = make_recipe(values)
    run(recipe, factors, tmp_path / "whole")
    killed(recipe, factors, tmp_path / "killed", 2, monkeypatch)
    run(recipe, factors, tmp_path / "killed")
    expected = weights(tmp_path / "whole", "unet", "text_encoder")
    assert different(expected, weights(tmp_path / "killed", "unet", "text_encoder")) == []
    # other captions are another training, and the model card says which
    run(told(tiny, dropout=0.9), factors, tmp_path / "other")
    assert len(different(expected, weights(tmp_path / "other", "unet", "text_encoder"))) > 10
    card = read_card(LocalStore(str(tmp_path / "other")))
    assert card["recipe"]["data"]["captions"]["dropout"] == 0.9
    assert all("{finding}" in template for template in card["recipe"]["data"]["captions"]["templates"])


def test_an_own_caption_comes_before_one_from_data(
    tiny: Recipe, images: Path, captioned: Callable, tmp_path: Path
) -> None:
    manifest = captioned(lambda image: "mild")
    run(told(tiny), manifest, tmp_path / "told")
    values = told(tiny).model_dump(mode="json")
    values["data"]["captions"] = None
    run(make_recipe(values), manifest, tmp_path / "own")
    same = weights(tmp_path / "told", "unet", "text_encoder"), weights(tmp_path / "own", "unet", "text_encoder")
    assert different(*same) == []


def test_captions_from_data_that_are_too_long_are_refused_before_training(
    tiny: Recipe, factors: Path, tmp_path: Path
) -> None:
    values = told(tiny).model_dump(mode="json")
    values["model"]["tokenizer_length"] = 16
    with pytest.raises(RecipeError, match=r"data\.captions: a caption such as '.*' has \d+ tokens; raise model"):
        run(make_recipe(values), factors, tmp_path / "long")
    assert not (tmp_path / "long" / "diffva.json").exists()


def test_another_table_is_another_training_with_captions_from_data(tiny: Recipe, factors: Path) -> None:
    text = factors.read_text()
    edited = factors.with_name("edited.csv")
    edited.write_text(text.replace(",F,", ",M,", 1))
    for recipe, equal in ((told(tiny), False), (tiny, True)):
        _, first, _ = training_keys(recipe, str(factors))
        _, second, _ = training_keys(recipe, str(edited))
        assert (first["images"] == second["images"]) == equal
