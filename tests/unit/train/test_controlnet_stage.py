"""Stage ``controlnet``: it trains beside a model whose weights do not change, and resumes exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from trainings import different, killed, run, weights, with_stages

from diffva_ray.config.recipe import Recipe, RecipeError
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


def test_conditions_that_do_not_exist_are_named(tiny: Recipe) -> None:
    with pytest.raises(RecipeError, match=r"conditions.*'lungs' or 'edges'"):
        with_stages(tiny, {**CONTROLNET, "conditions": ["ribs"]})
