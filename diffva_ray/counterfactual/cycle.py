"""``cycle``: noise the image, recover the noise with which the sampler would return to it, and sample under the healthy
prompt with the same noise (Wu & De la Torre 2023, "A latent space of stochastic diffusion models", CycleDiffusion;
Huberman-Spiegelglas et al. 2024).

Where the two prompts agree, the recovered noise leads back to the image exactly, so only the disagreement is edited.
"""

from __future__ import annotations

import torch

from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion, noise, split


def generate(model: LatentDiffusion, request: Edit) -> Generated:
    """Edit a batch by CycleDiffusion, on the timesteps of ``ddim``."""
    _, timesteps = model.schedule(request)
    alpha_bar = [model.alphas[t] for t in timesteps]
    alpha_bar.append(torch.ones_like(alpha_bar[0]))  # the clean image

    # Run the forward process from the clean image up to the noisiest level.
    path = [request.latents]
    noises = torch.stack([noise(request.latents.shape, request.generators) for _ in timesteps]).to(request.latents)
    for eps, upper, lower in zip(noises, reversed(alpha_bar[:-1]), reversed(alpha_bar[1:]), strict=True):
        alpha = upper / lower
        path.insert(0, alpha.sqrt() * path[0] + (1 - alpha).sqrt() * eps)

    z = path[0]
    for i, t in enumerate(timesteps):
        # Recover this step's noise: what the sampler under the source prompt misses of the image's own path.
        mean_source = _mean(model, path[i], model.predict(path[i], t, request.source), alpha_bar[i], alpha_bar[i + 1])
        sigma_eps = path[i + 1] - mean_source

        # Take the step under guidance to the healthy prompt, with the recovered noise.
        mean = _mean(model, z, model.guided(z, t, request), alpha_bar[i], alpha_bar[i + 1])
        z = mean + sigma_eps
    return model.generated(z, request)


def _mean(
    model: LatentDiffusion, z: torch.Tensor, output: torch.Tensor, alpha_bar: torch.Tensor, alpha_bar_next: torch.Tensor
) -> torch.Tensor:
    """Mean of the next latents (Song et al. 2021, equation 12 with eta = 1: the DDPM sampler)."""
    z_0, eps = split(output, z, alpha_bar, model.prediction_type)
    variance = (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
    return alpha_bar_next.sqrt() * z_0 + (1 - alpha_bar_next - variance).clamp(min=0).sqrt() * eps
