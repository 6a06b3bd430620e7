"""``ddim-inversion``: encode the image by DDIM run backwards under the source prompt ("" needs no label), then decode
under guidance to the healthy prompt (Sanchez et al. 2022, "What is healthy?"; Song et al. 2021, equation 13).

The method samples no noise, so the encoding keeps everything that the prompt does not change. Each step up asks the
network at the timestep that the step leads to, as diffusers' DDIMInverseScheduler does. The step down between the same
two noise levels asks at the same timestep, so that their errors cancel to first order.
"""

from __future__ import annotations

import torch

from diffva_ray.counterfactual.deep_features import deep_features_kept
from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion, split


def generate(model: LatentDiffusion, request: Edit) -> Generated:
    """Edit a batch by DDIM inversion."""
    scheduler, timesteps = model.schedule(request)

    # Invert to the chosen noise level.
    z_t = invert(model, request, timesteps)

    # Denoise under guidance to the healthy prompt.
    z_0 = model.denoise(z_t, request, scheduler, timesteps)
    return model.generated(z_0, request)


def invert(model: LatentDiffusion, request: Edit, timesteps: torch.Tensor) -> torch.Tensor:
    """Latents [n, 4, h, w] at the noisiest of ``timesteps`` [k] (falling), from which DDIM leads back to the image."""
    return inversion_path(model, request, timesteps)[0]


def inversion_path(model: LatentDiffusion, request: Edit, timesteps: torch.Tensor) -> list[torch.Tensor]:
    """Latents [n, 4, h, w] at each of ``timesteps`` [k] (falling), from the noisiest down, and last the image's own."""
    path, alpha = [request.latents], model.final_alpha
    with deep_features_kept(model.unet, request.config.acceleration.deep_features_every):
        for t in timesteps.flip(0):
            # Predict the clean latents and the noise under the source prompt.
            output = model.predict(path[0], t, request.source)
            z_0, eps = split(output, path[0], alpha, model.prediction_type)

            # Step up: combine both at the next higher noise level.
            alpha = model.alphas[t]
            path.insert(0, alpha.sqrt() * z_0 + (1 - alpha).sqrt() * eps)
    return path
