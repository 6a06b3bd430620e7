"""Wolleb et al. 2022, "Diffusion models for medical anomaly detection", algorithm 1 (method ``wolleb``): encode the
image by DDIM with an unconditional model, decode along the gradient of a classifier of noisy images,

    eps' = eps(z_t, t) - s sqrt(1 - alpha_bar) grad log p(healthy | z_t, t),    s: ``generate.classifier_guided.scale``.

Differences: latents instead of pixels; the unconditional model is our UNet under the empty prompt, which training mixes
in; the classifier knows all classes of the data instead of two. ``classifier-guided`` is the same under any source
prompt, by the model's guess in most recipes, with the scheduler's step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from diffva_ray.counterfactual.classifier_guided import gradient, latent_classifier
from diffva_ray.counterfactual.ddim_inversion import invert
from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion
from diffva_ray.references.ddim import decode, noise_under

Clean = Callable[[torch.Tensor], torch.Tensor]


def generate(model: LatentDiffusion, request: Edit) -> Generated:
    """Edit a batch; neither prompt nor source prompt has an effect. Raises UnusableModel without a classifier."""
    return along_the_classifier(model, request)


def along_the_classifier(model: LatentDiffusion, request: Edit, clean: Clean | None = None) -> Generated:
    """Encode without a prompt, decode along the classifier's gradient; ``clean``: as in ``decode``."""
    classifier, scale = latent_classifier(model), request.config.classifier_guided.scale

    def predict(z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        shift = (1 - model.alphas[t]).sqrt() * gradient(classifier, z_t, model.on_device(t))
        return noise_under(model, z_t, t, request.empty) - scale * shift

    _, timesteps = model.schedule(request)
    encoded = invert(model, replace(request, source=request.empty), timesteps)
    return model.generated(decode(model, encoded, timesteps, predict, clean), request)
