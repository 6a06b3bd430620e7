"""``classifier-guided``: encode the image by DDIM inversion up to a noise level, decode it with the gradient of a
classifier that knows noise (Wolleb et al. 2022, "Diffusion models for medical anomaly detection", algorithm 1;
Dhariwal & Nichol 2021, algorithm 2).

The text steers neither way: both passes predict noise under the source prompt ("" is Wolleb's unconditional model), so
without a classifier the image comes back as the autoencoder leaves it.
"""

from __future__ import annotations

from typing import Any

import torch

from diffva_ray.counterfactual.ddim_inversion import invert
from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion


def generate(model: LatentDiffusion, request: Edit) -> Generated:
    """Raises UnusableModel for a model without a classifier."""
    with torch.inference_mode(False):  # weights loaded in inference mode could never take part in a gradient
        classifier = model.bundle.extra("classifier").to(request.latents.device, torch.float32).eval()
        classifier.requires_grad_(False)
    scheduler, timesteps = model.schedule(request)
    latents = invert(model, request, timesteps)
    for timestep in timesteps:
        output = model.predict(latents, timestep, request.source)
        alpha = model.alphas.to(latents)[timestep]
        push = request.config.classifier_guided.scale * (1 - alpha).sqrt() * gradient(classifier, latents, timestep)
        if model.prediction_type == "v_prediction":  # v = (noise - sigma * latents) / sqrt(alpha)
            push = push / alpha.sqrt()
        latents = scheduler.step(output - push, timestep, latents).prev_sample
    return model.generated(latents, request)


def gradient(classifier: Any, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """grad log p(healthy | z_t, t) with respect to the latents z_t [n, 4, h, w], also within inference mode."""
    with torch.inference_mode(False), torch.enable_grad():
        variable, time = latents.clone().requires_grad_(), timestep.clone().to(latents.device)
        return torch.autograd.grad(classifier.log_healthy(variable, time).sum(), variable)[0]
