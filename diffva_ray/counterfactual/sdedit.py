"""``sdedit``, the paper's method: noise the film part of the way, denoise it under the healthy prompt
(Meng et al. 2022; StableDiffusionImg2ImgPipeline)."""

from __future__ import annotations

import torch

from diffva_ray.counterfactual.latents import Denoiser, Edit, noise


def edit(denoiser: Denoiser, request: Edit) -> torch.Tensor:
    """Edited latents [n, 4, h, w]. Noise comes from each film's own generator."""
    scheduler, timesteps = denoiser.schedule(request)
    fresh = noise(request.latents.shape, request.generators).to(request.latents)
    noisy = scheduler.add_noise(request.latents, fresh, timesteps[:1].repeat(len(fresh)))
    return denoiser.denoise(noisy, request, scheduler, timesteps)
