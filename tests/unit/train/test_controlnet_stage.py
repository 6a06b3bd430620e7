"""Stage ``controlnet``: it trains beside a model whose weights do not change, and resumes exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from trainings import different, killed, run, weights, with_stages

from diffva_ray.config.recipe import Recipe, RecipeError
from diffva_ray.data.dataset import UnusableData
from diffva_ray.model.bundle import build, load

DENOISER = {"name": "denoiser", "trains": "denoiser", "steps": 2, "batch_size": 4, "learning_rate": 1e-3}
CONTROLNET = {"name": "structure", "trains": "controlnet", "steps": 4, "batch_size": 4, "learning_rate": 1e-3,
              "prompt_dropout": 0.3, "snr_gamma": 5.0}  # fmt: skip


def only(model: Path) -> dict[str, torch.Tensor]:
    return {name.removeprefix("controlnet."): value for name, value in weights(model, "controlnet").items()}


def test_it_begins_as_the_trained_unets_copy_and_only_it_moves(tiny: Recipe, images: Path, tmp_path: Path) -> None:
    run(with_stages(tiny, DENOISER), images, tmp_path / "before")
    run(with_stages(tiny, DENOISER, {**CONTROLNET, "steps": 0}), images, tmp_path / "begun")
    run(with_stages(tiny, DENOISER, CONTROLNET), images, tmp_path / "after")
    before, begun, after = (load(str(tmp_path / name)) for name in ("before", "begun", "after"))
    start, end = (only(tmp_path / name) for name in ("begun", "after"))
    unet = before.unet.state_dict()
    shared = [name for name in start if name in unet]
    assert any(name.startswith("mid_block") for name in shared)
    assert all(torch.equal(start[name], unet[name]) for name in shared)
    assert not torch.equal(unet["conv_in.weight"], build(tiny).unet.state_dict()["conv_in.weight"])
    assert [name for name in start if torch.equal(start[name], end[name])] == []
    for name in ("vae", "unet", "text_encoder"):
        kept, found = before.modules[name].state_dict(), after.modules[name].state_dict()
        assert all(torch.equal(kept[key], found[key]) for key in kept), name
    assert tuple(after.extra("controlnet").config.conditions) == ("lungs", "edges")
    assert len({bundle.digest for bundle in (before, begun, after)}) == 3


@pytest.mark.parametrize("kill_at", [1, 2, 3, 5])
def test_killed_and_resumed_is_bitwise_the_undisturbed_training(
    kill_at: int, tiny: Recipe, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 0-1 are the denoiser's, 2-5 the ControlNet's."""
    recipe = with_stages(tiny, DENOISER, CONTROLNET, checkpoint_every=2)
    run(recipe, images, tmp_path / "whole")
    killed(recipe, images, tmp_path / "killed", kill_at, monkeypatch)
    run(recipe, images, tmp_path / "killed")
    whole, resumed = (weights(tmp_path / name, "controlnet", "unet") for name in ("whole", "killed"))
    assert different(whole, resumed) == []


@pytest.fixture(scope="module")
def own(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the images with a table that names a depth image, the X-ray's negative, for each."""
    folder = tmp_path_factory.mktemp("own")
    rows = []
    for file in sorted(images.glob("*/images/*.png")):
        name = f"{file.parts[-3]}-{file.stem}.png"
        pixels = np.asarray(Image.open(file))
        Image.fromarray(pixels).save(folder / name)
        Image.fromarray(255 - pixels).save(folder / f"depth-{name}")
        rows.append({"path": name, "label": file.parts[-3], "condition.depth": f"depth-{name}"})
    pd.DataFrame(rows).to_csv(folder / "images.csv", index=False)
    return folder / "images.csv"


DEPTH = {**CONTROLNET, "name": "depth", "conditions": ["condition.depth"]}


def test_each_stage_adds_a_controlnet_and_a_killed_training_resumes_exactly(
    own: Path, tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = with_stages(tiny, CONTROLNET, DEPTH, checkpoint_every=2)
    run(recipe, own, tmp_path / "whole")
    killed(recipe, own, tmp_path / "killed", 5, monkeypatch)  # in the second stage
    run(recipe, own, tmp_path / "killed")
    whole, resumed = (weights(tmp_path / name, "controlnet", "controlnet_1") for name in ("whole", "killed"))
    assert different(whole, resumed) == []
    networks = load(str(tmp_path / "whole")).controlnets
    assert [list(network.config.conditions) for network in networks] == [["lungs", "edges"], ["condition.depth"]]
    # the first is that of a training without the second
    run(with_stages(tiny, CONTROLNET), own, tmp_path / "one")
    assert different(weights(tmp_path / "one", "controlnet"), weights(tmp_path / "whole", "controlnet")) == []
    # other condition images give other weights
    table = pd.read_csv(own)
    table.assign(**{"condition.depth": table["path"]}).to_csv(own.parent / "others.csv", index=False)
    run(with_stages(tiny, CONTROLNET, DEPTH), own.parent / "others.csv", tmp_path / "others")
    assert different(weights(tmp_path / "others", "controlnet_1"), weights(tmp_path / "whole", "controlnet_1"))


def test_unusable_condition_images_are_one_line(own: Path, images: Path, tiny: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UnusableData, match=r"stage depth: \d+ of \d+ images have none in column condition\.depth"):
        run(with_stages(tiny, DEPTH), images, tmp_path / "none")
    (own.parent / "damaged.png").write_text("no image")
    table = pd.read_csv(own)
    table.assign(**{"condition.depth": "damaged.png"}).to_csv(own.parent / "damaged.csv", index=False)
    with pytest.raises(UnusableData, match=r"stage depth: condition image damaged\.png \(condition\.depth\): not an"):
        run(with_stages(tiny, DEPTH), own.parent / "damaged.csv", tmp_path / "damaged")
    validated = with_stages(tiny, DEPTH, validation={"every": 2})
    controlled = validated.model_copy(
        update={"generate": tiny.generate.model_copy(update={"method": "controlnet", "scheduler": "ddim"})}
    )
    with pytest.raises(RecipeError, match=r"images of the validation have no condition\.depth"):
        run(controlled, own, tmp_path / "validated")


@pytest.mark.parametrize("conditions", [["condition."], ["condition.a", "condition.b"], ["lungs", "condition.a"], []])
def test_one_stage_reads_one_column(conditions: list[str], tiny: Recipe) -> None:
    with pytest.raises(RecipeError, match=r"conditions.*one column 'condition\.NAME'"):
        with_stages(tiny, {**CONTROLNET, "conditions": conditions})


def test_conditions_that_do_not_exist_are_named(tiny: Recipe) -> None:
    with pytest.raises(RecipeError, match=r"conditions.*'lungs' or 'edges'"):
        with_stages(tiny, {**CONTROLNET, "conditions": ["ribs"]})
