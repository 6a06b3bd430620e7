"""Predicts which prompt an image shows: the one under which the model predicts the image's noise best.

A zero-shot diffusion classifier (Li et al. 2023, "Your diffusion model is secretly a zero-shot classifier"). It needs
neither the image's label nor the judge. All prompts of an image see the same noise, so their errors are paired.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffva_ray.counterfactual.latent_diffusion import LatentDiffusion, split
from diffva_ray.counterfactual.noising import noised

NOISE_SAMPLES = 2  # noise samples per timestep
TIMESTEPS = (0.1, 0.2, 0.3, 0.4)  # of the training schedule: late enough to hide detail, early enough to keep lesions


@torch.inference_mode()
def guess(
    model: LatentDiffusion, latents: torch.Tensor, embeddings: Sequence[torch.Tensor], seeds: Sequence[int]
) -> list[int]:
    """Index into ``embeddings`` ([1, length, width] each) for every image's latents [n, 4, h, w].

    Costs NOISE_SAMPLES * len(TIMESTEPS) * len(embeddings) network calls. The noise comes from separate generators, so
    the guess does not change what the method samples.
    """
    generators = [torch.Generator("cpu").manual_seed((seed + 1) % 2**63) for seed in seeds]
    errors = torch.zeros(len(latents), len(embeddings), device=latents.device)
    for fraction in TIMESTEPS * NOISE_SAMPLES:
        z_t, eps, t, alpha_bar = noised(model, latents, fraction, generators)
        for column, embedding in enumerate(embeddings):
            output = model.predict(z_t, t, embedding.expand(len(latents), -1, -1))
            _, predicted = split(output, z_t, alpha_bar, model.prediction_type)
            errors[:, column] += ((predicted - eps) ** 2).flatten(1).sum(1)
    return errors.argmin(dim=1).tolist()
