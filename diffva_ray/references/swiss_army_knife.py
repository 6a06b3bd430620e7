"""Wolleb et al. 2022b, "The Swiss army knife for image-to-image translation: multi-task diffusion models" (method
``swiss-army-knife``): encode the image by DDIM with an unconditional model, decode along the gradient of a task
network. For a regression R towards the value c (section 2) the gradient is that of the squared error,

    eps' = eps(z_t, t) + s sqrt(1 - alpha_bar) grad (R(z_t, t) - c)^2 / 2.

The task here is the severity of disease: R is the log odds of "not healthy" of the classifier of noisy latents, c is
``generate.references.severity``. s is ``generate.classifier_guided.scale``. Unlike ``wolleb``'s gradient, this one
vanishes when the wanted value is reached, so that the image can be moved to any severity, also a higher one.

Differences: their regression network is trained on ages and their segmentation network on tumour masks; ours is a
classifier trained on the labels. Latents instead of pixels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from diffva_ray.counterfactual.classifier_guided import latent_classifier
from diffva_ray.counterfactual.ddim_inversion import invert
from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion
from diffva_ray.references.ddim import decode, noise_under


def generate(model: LatentDiffusion, request: Edit) -> Generated:
    """Edit a batch; prompts have no effect. Raises UnusableModel without a classifier."""
    classifier, config = latent_classifier(model), request.config

    def predict(z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        slope = task_gradient(classifier, z_t, model.on_device(t), config.references.severity)
        shift = (1 - model.alphas[t]).sqrt() * slope
        return noise_under(model, z_t, t, request.empty) + config.classifier_guided.scale * shift

    _, timesteps = model.schedule(request)
    encoded = invert(model, replace(request, source=request.empty), timesteps)
    return model.generated(decode(model, encoded, timesteps, predict), request)


def severity(classifier: Any, z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Log odds [n] of "not healthy" for latents at a timestep."""
    healthy: torch.Tensor = classifier.log_healthy(z_t, t)
    return torch.log1p(-healthy.exp().clamp(max=1 - 1e-6)) - healthy


def task_gradient(classifier: Any, latents: torch.Tensor, timestep: torch.Tensor, wanted: float) -> torch.Tensor:
    """Gradient of (R(z_t, t) - wanted)^2 / 2 with respect to the latents; works in inference mode too."""
    with torch.inference_mode(False), torch.enable_grad():
        z_t, t = latents.clone().requires_grad_(), timestep.clone()
        error = (severity(classifier, z_t, t) - wanted).square().sum() / 2
        return torch.autograd.grad(error, z_t)[0]
