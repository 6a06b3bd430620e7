"""``controlnet``: SDEdit under condition images, the same as diffusers' StableDiffusionControlNetImg2ImgPipeline (Zhang
et al. 2023; the paper's equation 7). Each ControlNet of the model reads its condition image (lungs and edges, or a
user's own), and their outputs are added by weight, while the prompt edits the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel

from diffva_ray.config.generation import ControlNetConfig
from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion, add_noise, noise
from diffva_ray.data.conditions import condition, own_columns
from diffva_ray.model.bundle import Bundle
from diffva_ray.model.card import UnusableModel, conditions_of


def controls(bundle: Bundle, options: ControlNetConfig) -> list[tuple[Any, list[str], float]]:
    """The ControlNets in use, each with its conditions and its weight; those of weight 0 are left out.

    Raises UnusableModel for a model without a ControlNet, and for a wrong number of weights.
    """
    networks = bundle.controlnets
    conditions = [conditions_of(network.config, f"{bundle.folder}/controlnet") for network in networks]
    try:
        weights = options.weights(conditions)
    except ValueError as error:
        raise UnusableModel(str(error)) from None
    return [control for control in zip(networks, conditions, weights, strict=True) if control[2]]


def columns_read(bundle: Bundle, options: ControlNetConfig) -> list[str]:
    """The columns of the user's own condition images that the ControlNets in use read. Raises as ``controls``."""
    return own_columns([name for _, conditions, _ in controls(bundle, options) for name in conditions])


def condition_images(request: Edit, conditions: list[str]) -> torch.Tensor:
    """The condition images [n, 3, size, size] of one ControlNet: the user's own, or computed lungs and edges."""
    if columns := own_columns(conditions):
        return request.conditions[columns[0]]
    images, lungs = request.images.cpu().numpy(), request.lungs.cpu().numpy()
    drawn = [condition(image, mask, conditions) for image, mask in zip(images, lungs, strict=True)]
    return torch.from_numpy(np.stack(drawn)).to(request.latents.device)


def generate(model: LatentDiffusion, request: Edit) -> Generated:
    """Edit a batch by SDEdit with the model's ControlNets, which condition both branches of the guidance.

    Raises UnusableModel for a model without a ControlNet, and for a wrong number of weights.
    """
    options = request.config.controlnet
    dtype = next(model.unet.parameters()).dtype
    used = controls(model.bundle, options)
    networks: Any = MultiControlNetModel([network for network, _, _ in used])
    networks.to(request.latents.device, dtype).eval().requires_grad_(False)
    images = [condition_images(request, conditions).to(dtype) for _, conditions, _ in used]

    # Noise to the first timestep that the strength leaves.
    scheduler, timesteps = model.schedule(request)
    eps = noise(request.latents.shape, request.generators).to(request.latents)
    z = add_noise(scheduler, request.latents, eps, timesteps[0])

    branches = 2 if request.settings.guidance_scale > 1 else 1  # negative prompt and prompt, or the prompt alone
    states = torch.cat([request.negative, request.prompt][-branches:]).to(dtype)
    images = [torch.cat([image] * branches) for image in images]
    for i, t in enumerate(timesteps):
        # Residuals of the ControlNets; zero outside the chosen part of the trajectory.
        scaled = scheduler.scale_model_input(z, t)
        off = i / len(timesteps) < options.start or (i + 1) / len(timesteps) > options.end
        residuals = {}
        if used:
            down, middle = networks(
                torch.cat([scaled] * branches).to(dtype),
                model.on_device(t),
                states,
                images,
                [0.0 if off else weight for _, _, weight in used],
                return_dict=False,
            )
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

        # Classifier-free guidance, then the sampler's step.
        output = model.guided(scaled, t, request, **residuals)
        z = model.step(output, t, z, request, scheduler)
    return model.generated(z, request)
