"""An image's caption replaces its class's prompt in the training of the denoiser."""

from __future__ import annotations

import csv
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from trainings import different, run, weights, with_stages

from diffva_ray.config.recipe import Recipe
from diffva_ray.data.dataset import LabelledImage
from diffva_ray.data.datasets import open_dataset
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
