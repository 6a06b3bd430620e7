"""``ddim-inversion``: encode the film by running DDIM backwards under the source prompt ("" needs no label), decode it
under guidance to the healthy prompt (Sanchez et al. 2022, "What is healthy?"; Song et al. 2021, equation 13).

No noise is drawn: what the prompt does not speak of is carried through the encoding.
"""

from __future__ import annotations

import itertools

import torch

from diffva_ray.counterfactual.latents import Denoiser, Edit


def edit(denoiser: Denoiser, request: Edit) -> torch.Tensor:
    """Edited latents [n, 4, h, w]. Raises ValueError for a scheduler other than ``ddim``."""
    if request.scheduler != "ddim":
        raise ValueError(f"method ddim-inversion runs with scheduler ddim, not {request.scheduler}")
    scheduler, timesteps = denoiser.schedule(request)
    alphas = scheduler.alphas_cumprod.to(request.latents)
    latents = request.latents
    upward = timesteps.flip(0)
    for now, later in itertools.pairwise(upward):
        output = denoiser.predict(latents, now, request.source)
        clean, noise = split(output, latents, alphas[now], scheduler.config.prediction_type)
        latents = alphas[later].sqrt() * clean + (1 - alphas[later]).sqrt() * noise
    return denoiser.denoise(latents, request, scheduler, timesteps)


def split(
    output: torch.Tensor, latents: torch.Tensor, alpha: torch.Tensor, prediction_type: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The clean latents and the noise that a prediction (``epsilon`` or ``v_prediction``) sees in noisy ones."""
    signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
    if prediction_type == "v_prediction":
        return signal * latents - sigma * output, signal * output + sigma * latents
    return (latents - sigma * output) / signal, output
