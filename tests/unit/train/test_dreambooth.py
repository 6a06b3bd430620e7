"""DreamBooth's loss: equal to that of diffusers' script on a CLIP model, with equal seeds."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import DDPMScheduler

from diffva_ray.config.recipe import make_recipe
from diffva_ray.data.datasets import open_dataset
from diffva_ray.model.bundle import build
from diffva_ray.train.sampling import ImageSet, step_generator
from diffva_ray.train.stage import three_channels


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """The benchmark, which has the script's step in library calls."""
    file = Path(__file__).parents[3] / "benchmarks/train_vs_diffusers.py"
    spec = importlib.util.spec_from_file_location("train_vs_diffusers", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("step", [0, 3])
def test_the_loss_equals_diffusers_script(benchmark: ModuleType, images: Path, tmp_path: Path, step: int) -> None:
    recipe = benchmark.small_clip_model(tmp_path, 32)
    image_set = ImageSet(open_dataset(str(images)), 32)
    bundle = build(recipe)
    side = benchmark.DiffusersSide(recipe, image_set, torch.device("cpu"))
    positions = range(step * benchmark.BATCH, (step + 1) * benchmark.BATCH)
    indices = [side.stage.order[n] for n in positions] + [side.stage.prior.order[n] for n in positions]
    labels = [image_set.images[index].label for index in indices]
    assert labels == ["COVID"] * benchmark.BATCH + ["Normal"] * benchmark.BATCH
    theirs = benchmark.script_loss(
        bundle,
        DDPMScheduler.from_config(bundle.scheduler),
        three_channels(image_set.batch(indices)),
        [recipe.data.prompt(label) for label in labels],
        step_generator(recipe.seed, "covid", step),
    )
    assert benchmark.our_loss(recipe, image_set, step).item() == pytest.approx(theirs.item(), rel=1e-6)


def test_the_curves_agree(benchmark: ModuleType, images: Path, tmp_path: Path) -> None:
    """Five whole steps, with optimizer and clipping, have the same losses."""
    values = benchmark.small_clip_model(tmp_path / "base", 32).model_dump(mode="json")
    values["train"]["stages"][0]["steps"] = 5
    recipe = make_recipe(values)
    side = benchmark.DiffusersSide(recipe, ImageSet(open_dataset(str(images)), 32), torch.device("cpu"))
    theirs = [side.step(step) for step in range(5)]
    ours, _ = benchmark.our_run(recipe, str(images), tmp_path / "out")
    assert ours == pytest.approx(theirs, rel=1e-4)
