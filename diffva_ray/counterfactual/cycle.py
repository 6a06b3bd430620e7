"""``cycle``: noise the image, and record what noise the model would have had to draw on the way back to it; go back
under the healthy prompt with the same noise (Wu & De la Torre 2023, "A latent space of stochastic diffusion models",
CycleDiffusion; Huberman-Spiegelglas et al. 2024).

Where the two prompts agree the recorded noise leads back to the image exactly, so nothing else is lost.
"""

from __future__ import annotations

import torch

from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion, noise, split


def generate(model: LatentDiffusion, request: Edit) -> Generated:
    """Runs on the timesteps of ``ddim``."""
    _, timesteps = model.schedule(request)
    alphas = [model.alphas.to(request.latents)[timestep] for timestep in timesteps]
    alphas.append(torch.ones_like(alphas[0]))  # the image itself

    path = [request.latents]  # from the image up to the noisiest level, by the forward process
    for upper, lower in zip(reversed(alphas[:-1]), reversed(alphas[1:]), strict=True):
        kept = upper / lower
        fresh = noise(request.latents.shape, request.generators).to(request.latents)
        path.insert(0, kept.sqrt() * path[0] + (1 - kept).sqrt() * fresh)

    latents = path[0]
    for n, timestep in enumerate(timesteps):
        source = _mean(model, path[n], model.predict(path[n], timestep, request.source), alphas[n], alphas[n + 1])
        generated = _mean(model, latents, model.guided(latents, timestep, request), alphas[n], alphas[n + 1])
        latents = generated + (path[n + 1] - source)
    return model.generated(latents, request)


def _mean(
    model: LatentDiffusion, latents: torch.Tensor, output: torch.Tensor, alpha: torch.Tensor, next_alpha: torch.Tensor
) -> torch.Tensor:
    """The mean of the next latents (Song et al. 2021, equation 12 with eta = 1: the DDPM sampler)."""
    clean, predicted = split(output, latents, alpha, model.prediction_type)
    variance = (1 - next_alpha) / (1 - alpha) * (1 - alpha / next_alpha)
    return next_alpha.sqrt() * clean + (1 - next_alpha - variance).clamp(min=0).sqrt() * predicted
