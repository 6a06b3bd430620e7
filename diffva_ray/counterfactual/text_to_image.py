"""``text-to-image``, a control: denoise pure noise under the prompt, so that nothing of the image is left.

The paper's "no image prior" is SDEdit with strength 0.99, which keeps a part of the image's signal.
"""

from __future__ import annotations

import torch

from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion, add_noise, noise


def generate(model: LatentDiffusion, request: Edit) -> Generated:
    """Generate a batch from noise alone; each image's noise comes from its own generator."""
    scheduler, timesteps = model.schedule(request)
    eps = noise(request.latents.shape, request.generators).to(request.latents)
    z_t = add_noise(scheduler, torch.zeros_like(eps), eps, timesteps[0])
    return model.generated(model.denoise(z_t, request, scheduler, timesteps), request)
