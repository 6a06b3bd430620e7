"""Stages of the reference systems learn what their losses ask for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from trainings import run, with_stages

from diffva_ray.config.recipe import Recipe, RecipeError
from diffva_ray.model.bundle import build, load

HEALTHY_UNET = {"name": "healthy-unet", "trains": "healthy-unet", "steps": 60, "batch_size": 6, "learning_rate": 3e-3}


def test_the_healthy_only_denoiser_learns_and_leaves_the_model_as_it_is(
    tiny: Recipe, images: Path, tmp_path: Path
) -> None:
    history = run(with_stages(tiny, HEALTHY_UNET), images, tmp_path)
    losses = [entry["loss"] for entry in history]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    trained, start = load(str(tmp_path)), build(tiny)
    assert trained.extra("healthy_unet").config.noise_octaves == 2
    before, after = start.unet.state_dict(), trained.unet.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_textual_inversion_learns_vectors_and_nothing_else(tiny: Recipe, images: Path, tmp_path: Path) -> None:
    """On an untrained model the vectors can do little; they move, and every weight of the model stays."""
    stage = {"name": "words", "trains": "textual-inversion", "steps": 12, "batch_size": 4, "learning_rate": 0.05}
    run(with_stages(tiny, stage), images, tmp_path)
    trained, start = load(str(tmp_path)), build(tiny)
    concepts = trained.extra("textual_inversion")
    assert list(concepts.config.classes) == ["COVID", "Lung_Opacity", "Normal", "Viral Pneumonia"]
    assert concepts.vectors.std(0).mean() > 0
    for name in ("unet", "vae", "text_encoder"):
        before, after = start.modules[name].state_dict(), trained.modules[name].state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before), name


def test_noise_coarser_than_the_latents_is_refused(tiny: Recipe, images: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="noise_octaves 4 do not fit latents of side 8"):
        run(with_stages(tiny, {**HEALTHY_UNET, "noise_octaves": 4}), images, tmp_path)
