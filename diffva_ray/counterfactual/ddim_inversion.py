"""``ddim-inversion``: encode the film by running DDIM backwards under the source prompt ("" needs no label), decode it
under guidance to the healthy prompt (Sanchez et al. 2022, "What is healthy?"; Song et al. 2021, equation 13).

No noise is drawn: what the prompt does not speak of is carried through the encoding.
"""

from __future__ import annotations

import itertools

import torch

from diffva_ray.counterfactual.latents import Denoiser, Edit, split


def edit(denoiser: Denoiser, request: Edit) -> torch.Tensor:
    """Edited latents [n, 4, h, w]. Raises ValueError for a scheduler other than ``ddim``."""
    if request.scheduler != "ddim":
        raise ValueError(f"method ddim-inversion runs with scheduler ddim, not {request.scheduler}")
    scheduler, timesteps = denoiser.schedule(request)
    alphas = denoiser.alphas.to(request.latents)
    latents = request.latents
    upward = timesteps.flip(0)
    for now, later in itertools.pairwise(upward):
        output = denoiser.predict(latents, now, request.source)
        clean, noise = split(output, latents, alphas[now], denoiser.prediction_type)
        latents = alphas[later].sqrt() * clean + (1 - alphas[later]).sqrt() * noise
    return denoiser.denoise(latents, request, scheduler, timesteps)
