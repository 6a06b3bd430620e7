"""``ddim-inversion``: encode the image by running DDIM backwards under the source prompt ("" needs no label), decode it
under guidance to the healthy prompt (Sanchez et al. 2022, "What is healthy?"; Song et al. 2021, equation 13).

No noise is drawn: what the prompt does not speak of is carried through the encoding.
"""

from __future__ import annotations

import itertools

import torch

from diffva_ray.counterfactual.deep_features import deep_features_kept
from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion, split


def generate(model: LatentDiffusion, request: Edit) -> Generated:
    """The inverted latents, denoised under the healthy prompt."""
    scheduler, timesteps = model.schedule(request)
    latents = invert(model, request, timesteps)
    return model.generated(model.denoise(latents, request, scheduler, timesteps), request)


def invert(model: LatentDiffusion, request: Edit, timesteps: torch.Tensor) -> torch.Tensor:
    """Latents [n, 4, h, w] of the noisiest of ``timesteps`` [k] (falling), from which DDIM leads back to the image."""
    return inversion_path(model, request, timesteps)[0]


def inversion_path(model: LatentDiffusion, request: Edit, timesteps: torch.Tensor) -> list[torch.Tensor]:
    """The latents [n, 4, h, w] of each of ``timesteps`` [k] (falling), from the noisiest down to the image's own."""
    alphas = model.alphas.to(request.latents)
    path = [request.latents]
    with deep_features_kept(model.unet, request.config.acceleration.deep_features_every):
        for now, later in itertools.pairwise(timesteps.flip(0)):
            output = model.predict(path[0], now, request.source)
            clean, noise = split(output, path[0], alphas[now], model.prediction_type)
            path.insert(0, alphas[later].sqrt() * clean + (1 - alphas[later]).sqrt() * noise)
    return path
