"""Noises an image's latents to a level of the training schedule, for methods that read single noise predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from diffva_ray.counterfactual.latent_diffusion import LatentDiffusion, noise


class Noised(NamedTuple):
    """Noisy latents and what they were made of."""

    latents: torch.Tensor  # z_t [n, 4, h, w]
    noise: torch.Tensor  # the noise eps in them [n, 4, h, w]
    timestep: torch.Tensor  # t, a scalar on the CPU
    alpha: torch.Tensor  # alpha_bar of t, a scalar on the CPU on the CPU


def noised(
    model: LatentDiffusion, latents: torch.Tensor, fraction: float, generators: Sequence[torch.Generator]
) -> Noised:
    """sqrt(alpha_bar) z + sqrt(1 - alpha_bar) eps (Ho et al. 2020, equation 4) of latents [n, 4, h, w], at ``fraction``
    of the training schedule (in [0, 1)); the noise of image i comes from generator i."""
    timestep = torch.tensor(int(fraction * len(model.alphas)))
    alpha, eps = model.alphas[timestep], noise(latents.shape, generators).to(latents)
    return Noised(alpha.sqrt() * latents + (1 - alpha).sqrt() * eps, eps, timestep, alpha)
