"""``controlnet``: SDEdit with a structure prior, the same as diffusers' StableDiffusionControlNetImg2ImgPipeline (Zhang
et al. 2023; the paper's equation 7). The ControlNet keeps lungs and edges in place while the prompt edits the rest."""

from __future__ import annotations

import numpy as np
import torch

from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion, add_noise, noise
from diffva_ray.data.conditions import condition


def generate(model: LatentDiffusion, request: Edit) -> Generated:
    """Edit a batch by SDEdit with a ControlNet, which conditions both branches of the guidance.

    Raises UnusableModel for a model without a ControlNet.
    """
    options = request.config.controlnet
    dtype = next(model.unet.parameters()).dtype
    controlnet = model.bundle.extra("controlnet").to(request.latents.device, dtype).eval().requires_grad_(False)

    # Condition images: the lungs, and the edges outside them.
    images, lungs = request.images.cpu().numpy(), request.lungs.cpu().numpy()
    kinds = controlnet.config.conditions
    conditions = np.stack([condition(image, mask, kinds) for image, mask in zip(images, lungs, strict=True)])
    control = torch.from_numpy(conditions).to(request.latents.device, dtype)

    # Noise to the first timestep that the strength leaves.
    scheduler, timesteps = model.schedule(request)
    eps = noise(request.latents.shape, request.generators).to(request.latents)
    z = add_noise(scheduler, request.latents, eps, timesteps[0])

    branches = 2 if request.settings.guidance_scale > 1 else 1  # negative prompt and prompt, or the prompt alone
    states = torch.cat([request.negative, request.prompt][-branches:]).to(dtype)
    control = torch.cat([control] * branches)
    for i, t in enumerate(timesteps):
        # ControlNet residuals; zero outside the chosen part of the trajectory.
        scaled = scheduler.scale_model_input(z, t)
        off = i / len(timesteps) < options.start or (i + 1) / len(timesteps) > options.end
        down, middle = controlnet(
            torch.cat([scaled] * branches).to(dtype),
            model.on_device(t),
            states,
            control,
            conditioning_scale=0.0 if off else options.conditioning_scale,
            return_dict=False,
        )

        # Classifier-free guidance, then the sampler's step.
        output = model.guided(
            scaled, t, request, down_block_additional_residuals=down, mid_block_additional_residual=middle
        )
        z = model.step(output, t, z, request, scheduler)
    return model.generated(z, request)
