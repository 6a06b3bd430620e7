"""Guessing which prompt an image shows, on a network that denoises exactly."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.counterfactual.guess import guess
from diffva_ray.counterfactual.latent_diffusion import LatentDiffusion
from diffva_ray.data.phantoms import phantom
from diffva_ray.model.bundle import SD_SCHEDULER, load


class ConstantImages(torch.nn.Module):
    """Denoises exactly where all clean latents equal the mean of the prompt's embedding."""

    def __init__(self, alphas: torch.Tensor) -> None:
        super().__init__()
        self.alphas = alphas
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, latents, timestep, encoder_hidden_states):
        alpha = self.alphas[timestep]
        clean = encoder_hidden_states.mean(dim=(1, 2))[:, None, None, None]
        return SimpleNamespace(sample=(latents - alpha.sqrt() * clean) / (1 - alpha).sqrt())


def test_the_prompt_that_explains_the_noise_is_found() -> None:
    vae = SimpleNamespace(config=SimpleNamespace(scaling_factor=1.0))
    model = LatentDiffusion(SimpleNamespace(vae=vae, unet=None, scheduler=SD_SCHEDULER))
    model.unet = ConstantImages(model.alphas)
    values = [-1.0, 0.2, 0.3, 2.0]
    latents = torch.stack([torch.full((4, 8, 8), values[n]) for n in (2, 0, 3, 1, 2)])
    embeddings = [torch.full((1, 3, 5), value) for value in values]
    assert guess(model, latents, embeddings, seeds=[1, 2, 3, 4, 5]) == [2, 0, 3, 1, 2]


def test_the_engine_returns_the_guessed_source_prompts(model: Path) -> None:
    bundle = load(str(model))
    engine = CounterfactualEngine(bundle, bundle.recipe.generate, "cpu")
    images = [phantom(label, 1, size=32).image for label in ("COVID", "Normal")]
    counterfactuals = engine(images, seeds=[1, 2])
    data = bundle.recipe.data
    prompts_or_empty = {"", *(data.prompt(label) for label in data.prompts if label != data.healthy_class)}
    assert set(counterfactuals.source_prompts) <= prompts_or_empty
    alone = engine([images[1]], seeds=[2])
    assert alone.source_prompts[0] == counterfactuals.source_prompts[1]
    assert np.array_equal(alone.counterfactuals[0], counterfactuals.counterfactuals[1])
