"""The classifier of noisy latents: saved in its own folder, with logits that depend on the noise level."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffva_ray.config.recipe import Recipe
from diffva_ray.model.bundle import build, load, save
from diffva_ray.model.classifier import LatentClassifier
from diffva_ray.storage.local import LocalStore


def classifier() -> LatentClassifier:
    torch.manual_seed(0)
    return LatentClassifier(["COVID", "Normal", "Viral Pneumonia"], "Normal", 4, (8, 16), 4).eval()


def test_it_is_saved_with_the_model_and_part_of_its_digest(tiny: Recipe, tmp_path: Path) -> None:
    bundle = build(tiny)
    plain = save(bundle, LocalStore(str(tmp_path / "plain")), {})
    bundle.extras["classifier"] = classifier()
    digest = save(bundle, LocalStore(str(tmp_path / "with")), {})
    assert digest != plain
    again = load(str(tmp_path / "with")).extra("classifier")
    latents = torch.randn(2, 4, 8, 8)
    assert again.classes == ("COVID", "Normal", "Viral Pneumonia")
    assert again.healthy == "Normal"
    assert torch.equal(again(latents, torch.tensor(7)), bundle.extras["classifier"](latents, torch.tensor(7)))


def test_logits_depend_on_the_noise_level() -> None:
    network, latents = classifier().requires_grad_(False), torch.randn(2, 4, 8, 8)
    single, batch = network(latents, torch.tensor(1)), network(latents, torch.tensor([1, 900]))
    assert single.shape == (2, 3)
    assert batch[0] == pytest.approx(single[0], abs=1e-5)
    assert (batch[1] - single[1]).abs().max() > 1e-4
    assert network.log_healthy(latents, torch.tensor(1)).exp() == pytest.approx(single.softmax(1)[:, 1])


def test_an_unknown_healthy_class_is_named() -> None:
    with pytest.raises(ValueError, match="'Fit' is none of COVID"):
        LatentClassifier(["COVID", "Normal"], "Fit")
