"""``cycle``: noise the film, and record what noise the model would have had to draw on the way back to it; go back
under the healthy prompt with the same noise (Wu & De la Torre 2023, "A latent space of stochastic diffusion models",
CycleDiffusion; Huberman-Spiegelglas et al. 2024).

Where the two prompts agree the recorded noise leads back to the film exactly, so nothing else is lost.
"""

from __future__ import annotations

import torch

from diffva_ray.counterfactual.latents import Denoiser, Edit, noise, split


def edit(denoiser: Denoiser, request: Edit) -> torch.Tensor:
    """Edited latents [n, 4, h, w]. Raises ValueError for a scheduler other than ``ddim``, whose timesteps it uses."""
    if request.scheduler != "ddim":
        raise ValueError(f"method cycle runs with scheduler ddim, not {request.scheduler}")
    _, timesteps = denoiser.schedule(request)
    alphas = [denoiser.alphas.to(request.latents)[timestep] for timestep in timesteps]
    alphas.append(torch.ones_like(alphas[0]))  # the film itself

    path = [request.latents]  # from the film up to the noisiest level, by the forward process
    for upper, lower in zip(reversed(alphas[:-1]), reversed(alphas[1:]), strict=True):
        kept = upper / lower
        fresh = noise(request.latents.shape, request.generators).to(request.latents)
        path.insert(0, kept.sqrt() * path[0] + (1 - kept).sqrt() * fresh)

    latents = path[0]
    for n, timestep in enumerate(timesteps):
        source = _mean(denoiser, path[n], denoiser.predict(path[n], timestep, request.source), alphas[n], alphas[n + 1])
        healed = _mean(denoiser, latents, denoiser.guided(latents, timestep, request), alphas[n], alphas[n + 1])
        latents = healed + (path[n + 1] - source)
    return latents


def _mean(
    denoiser: Denoiser, latents: torch.Tensor, output: torch.Tensor, alpha: torch.Tensor, next_alpha: torch.Tensor
) -> torch.Tensor:
    """The mean of the next latents (Song et al. 2021, equation 12 with eta = 1: the DDPM sampler)."""
    clean, predicted = split(output, latents, alpha, denoiser.prediction_type)
    variance = (1 - next_alpha) / (1 - alpha) * (1 - alpha / next_alpha)
    return next_alpha.sqrt() * clean + (1 - next_alpha - variance).clamp(min=0).sqrt() * predicted
