"""``classifier-guided``: encode the image by DDIM inversion, then decode it along the gradient of a classifier of noisy
latents (Wolleb et al. 2022, "Diffusion models for medical anomaly detection", algorithm 1; Dhariwal & Nichol 2021,
algorithm 2).

The text has no effect: both passes predict noise under the source prompt ("" is Wolleb's unconditional model), so
without the classifier the method returns the autoencoder's reconstruction.
"""

from __future__ import annotations

from typing import Any

import torch

from diffva_ray.counterfactual.ddim_inversion import invert
from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion


def generate(model: LatentDiffusion, request: Edit) -> Generated:
    """Edit a batch by classifier guidance. Raises UnusableModel for a model without a classifier."""
    classifier = latent_classifier(model)
    scheduler, timesteps = model.schedule(request)

    # Invert to the chosen noise level.
    z = invert(model, request, timesteps)

    for t in timesteps:
        # Shift the predicted noise against the classifier's gradient: eps - s sqrt(1 - alpha_bar) grad log p(healthy).
        output = model.predict(z, t, request.source)
        alpha_bar = model.alphas[t]
        shift = (
            request.config.classifier_guided.scale
            * (1 - alpha_bar).sqrt()
            * gradient(classifier, z, model.on_device(t))
        )
        if model.prediction_type == "v_prediction":  # v = (eps - sqrt(1 - alpha_bar) z) / sqrt(alpha_bar)
            shift = shift / alpha_bar.sqrt()

        # DDIM step.
        z = scheduler.step(output - shift, t, z).prev_sample
    return model.generated(z, request)


def latent_classifier(model: LatentDiffusion) -> Any:
    """The model's classifier of noisy latents, on its device. Raises UnusableModel without one."""
    with torch.inference_mode(False):  # weights that are loaded in inference mode cannot take part in a gradient
        device = next(model.unet.parameters()).device
        return model.bundle.extra("classifier").to(device, torch.float32).eval().requires_grad_(False)


def gradient(classifier: Any, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Gradient of log p(healthy | z_t, t) with respect to the latents z_t [n, 4, h, w]; works in inference mode too."""
    with torch.inference_mode(False), torch.enable_grad():
        z_t, t = latents.clone().requires_grad_(), timestep.clone()
        return torch.autograd.grad(classifier.log_healthy(z_t, t).sum(), z_t)[0]
