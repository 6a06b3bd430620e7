"""DDIM with freedoms that the schedulers do not have, for the diffusion methods among the references: any prediction of
the noise, changes of the predicted clean latents, and the noise of the DDPM sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from diffva_ray.counterfactual.latent_diffusion import LatentDiffusion, split

Noise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (z_t, t) -> predicted noise [n, 4, h, w]


def noise_under(model: LatentDiffusion, z_t: torch.Tensor, t: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    """The noise that the model's UNet predicts under a prompt, also where it predicts velocity."""
    return split(model.predict(z_t, t, embedding), z_t, model.alphas[t], model.prediction_type)[1]


def decode(
    model: LatentDiffusion,
    z: torch.Tensor,
    timesteps: torch.Tensor,
    predict: Noise,
    clean: Callable[[torch.Tensor], torch.Tensor] | None = None,
    noises: Sequence[torch.Tensor] | torch.Tensor = (),
    after: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Denoise latents z at the first of ``timesteps`` (falling) to clean ones (Song et al. 2021, equation 12).

    ``clean`` changes the predicted clean latents of every step. ``noises``: one [n, 4, h, w] for each step, with which
    it is a step of the DDPM sampler (eta = 1); none: deterministic. ``after`` changes the latents after every step, by
    the alpha_bar of their level.
    """
    alphas = [*(model.alphas[t] for t in timesteps), model.final_alpha]
    for n, t in enumerate(timesteps):
        alpha, following = alphas[n], alphas[n + 1]
        eps = predict(z, t)
        z_0 = (z - (1 - alpha).sqrt() * eps) / alpha.sqrt()
        if clean is not None:
            z_0 = clean(z_0)
            eps = (z - alpha.sqrt() * z_0) / (1 - alpha).sqrt()
        variance = (1 - following) / (1 - alpha) * (1 - alpha / following) if len(noises) else torch.zeros(())
        z = following.sqrt() * z_0 + (1 - following - variance).clamp(min=0).sqrt() * eps
        if len(noises):
            z = z + variance.sqrt() * noises[n]
        z = z if after is None else after(z, following)
    return z
