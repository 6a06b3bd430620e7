"""``controlnet``: SDEdit with a structure prior, as StableDiffusionControlNetImg2ImgPipeline does it (Zhang et al.
2023; the paper's equation 7): a ControlNet holds lungs and edges where they are while the prompt generates."""

from __future__ import annotations

import numpy as np
import torch

from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion, noise
from diffva_ray.data.conditions import condition


def generate(model: LatentDiffusion, request: Edit) -> Generated:
    """Both branches of guidance see the condition. Raises UnusableModel for a model without a ControlNet."""
    options = request.config.controlnet
    dtype = next(model.unet.parameters()).dtype
    controlnet = model.bundle.extra("controlnet").to(request.latents.device, dtype).eval().requires_grad_(False)
    images, lungs = request.images.cpu().numpy(), request.lungs.cpu().numpy()
    kinds = controlnet.config.conditions
    conditions = np.stack([condition(image, mask, kinds) for image, mask in zip(images, lungs, strict=True)])
    control = torch.from_numpy(conditions).to(request.latents.device, dtype)

    scheduler, timesteps = model.schedule(request)
    fresh = noise(request.latents.shape, request.generators).to(request.latents)
    latents = scheduler.add_noise(request.latents, fresh, timesteps[:1].repeat(len(fresh)))
    branches = 2 if request.guidance_scale > 1 else 1
    states = torch.cat([request.negative, request.prompt][-branches:]).to(dtype)
    control = torch.cat([control] * branches)
    for n, timestep in enumerate(timesteps):
        scaled = scheduler.scale_model_input(latents, timestep)
        off = n / len(timesteps) < options.start or (n + 1) / len(timesteps) > options.end
        down, middle = controlnet(
            torch.cat([scaled] * branches).to(dtype),
            timestep,
            states,
            control,
            conditioning_scale=0.0 if off else options.conditioning_scale,
            return_dict=False,
        )
        output = model.guided(
            scaled, timestep, request, down_block_additional_residuals=down, mid_block_additional_residual=middle
        )
        latents = model.step(output, timestep, latents, request, scheduler)
    return model.generated(latents, request)
