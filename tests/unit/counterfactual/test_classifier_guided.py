"""``classifier-guided``: only the classifier's gradient changes the image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffva_ray.config.generation import ClassifierGuidedConfig
from diffva_ray.counterfactual.classifier_guided import gradient
from diffva_ray.counterfactual.engine import CounterfactualBatch, CounterfactualEngine
from diffva_ray.data.phantoms import phantom
from diffva_ray.model.bundle import load
from diffva_ray.model.card import UnusableModel
from diffva_ray.model.classifier import LatentClassifier

IMAGES = [phantom(label, n, seed=1, size=32).image for n, label in enumerate(["COVID", "Lung_Opacity", "Normal"])]


class Linear(torch.nn.Module):
    """p(healthy) = sigmoid(w . z - t / 1000): its gradient is known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 4 * 8 * 8).reshape(1, 4, 8, 8))

    def log_healthy(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.logsigmoid((latents * self.weight).sum(dim=(1, 2, 3)) - timestep / 1000)


def test_the_gradient_is_of_the_log_probability_also_in_inference_mode() -> None:
    classifier = Linear()
    with torch.inference_mode():
        latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)) / 10
        result = gradient(classifier, latents, torch.tensor(500))
        logit = (latents * classifier.weight).sum(dim=(1, 2, 3)) - 0.5
        expected = (1 - logit.sigmoid())[:, None, None, None] * classifier.weight
    assert torch.allclose(result, expected, atol=1e-6)


def engine_with(model: Path, scale: float) -> CounterfactualEngine:
    bundle = load(str(model))
    torch.manual_seed(0)
    bundle.extras["classifier"] = LatentClassifier(["COVID", "Normal"], "Normal", 4, (8, 16), 4)
    changes = {"classifier_guided": ClassifierGuidedConfig(scale=scale), "source_prompt": ""}
    return CounterfactualEngine(bundle, bundle.recipe.generate.model_copy(update=changes), "cpu")


def generate(
    engine: CounterfactualEngine, steps: int = 8, prompt: str = "normal chest scan", **changes: object
) -> CounterfactualBatch:
    settings = engine.settings.replace(
        method="classifier-guided", scheduler="ddim", num_inference_steps=steps, **changes
    )
    return engine(IMAGES, [1, 2, 3], [prompt] * 3, settings)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_guidance_raises_the_classifiers_own_probability(model: Path, prediction_type: str) -> None:
    """A larger scale raises p(healthy) of the counterfactuals' latents and moves them farther."""
    log_healthy, moved = [], []
    for scale in (0.0, 3.0, 30.0):
        engine = engine_with(model, scale)
        engine.model.prediction_type = prediction_type
        engine.bundle.scheduler["prediction_type"] = prediction_type
        ends, decode = [], engine.model.decode
        engine.model.decode = lambda latents, ends=ends, decode=decode: ends.append(latents) or decode(latents)
        generate(engine)
        with torch.inference_mode():
            log_healthy.append(engine.bundle.extra("classifier").log_healthy(ends[0], torch.tensor(0)).mean().item())
        moved.append((ends[0] - ends[1]).abs().mean().item())
    assert log_healthy == sorted(log_healthy)
    assert log_healthy[-1] > log_healthy[0] + 0.05
    assert moved == sorted(moved)


def test_without_guidance_the_result_is_the_reconstruction(model: Path) -> None:
    engine = engine_with(model, 0.0)
    gaps = []
    for steps in (10, 100):
        counterfactuals = generate(engine, steps, strength=0.5)
        gaps.append(np.abs(counterfactuals.counterfactuals - counterfactuals.reconstructions).mean())
    assert gaps[1] < gaps[0]
    assert gaps[1] < 0.02


def test_the_prompt_has_no_effect(model: Path) -> None:
    engine = engine_with(model, 30.0)
    one, two = generate(engine), generate(engine, prompt="COVID 19")
    assert np.array_equal(one.counterfactuals, two.counterfactuals)


def test_the_error_without_a_classifier_names_the_training_stage(model: Path) -> None:
    engine = CounterfactualEngine.from_pretrained(str(model), device="cpu")
    with pytest.raises(UnusableModel, match="trains: classifier"):
        generate(engine)
