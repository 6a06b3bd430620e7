"""An image's latents at a noise level of the training schedule: what all readings of the noise prediction start
from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from diffva_ray.counterfactual.latent_diffusion import LatentDiffusion, noise


class Noised(NamedTuple):
    """``latents`` [n, 4, h, w] as the network would meet them at ``timestep`` (a scalar), the ``noise`` in them, and
    alpha_bar of that timestep."""

    latents: torch.Tensor
    noise: torch.Tensor
    timestep: torch.Tensor
    alpha: torch.Tensor


def noised(
    model: LatentDiffusion, latents: torch.Tensor, fraction: float, generators: Sequence[torch.Generator]
) -> Noised:
    """sqrt(alpha_bar) z + sqrt(1 - alpha_bar) eps (Ho et al. 2020, equation 4) of latents [n, 4, h, w], at ``fraction``
    of the training schedule (in [0, 1)); image i's noise comes from generator i."""
    alphas = model.alphas.to(latents)
    timestep = torch.tensor(int(fraction * len(alphas)), device=latents.device)
    alpha, fresh = alphas[timestep], noise(latents.shape, generators).to(latents)
    return Noised(alpha.sqrt() * latents + (1 - alpha).sqrt() * fresh, fresh, timestep, alpha)
