"""Sanchez & Tsaftaris 2022, "Diffusion causal models for counterfactual estimation" (Diff-SCM, method ``diff-scm``),
algorithm 1: abduction encodes the image by DDIM without the cause, the intervention sets the cause (the class), and the
prediction decodes along the gradient of an anticausal classifier of noisy images, as in ``wolleb``, with the dynamic
normalisation of the authors' code.

Differences: latents; abduction starts at the strength instead of always at pure noise; the cause is the class of the
data, and the classifier is the one that ``wolleb`` uses.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from diffva_ray.counterfactual.classifier_guided import gradient, latent_classifier
from diffva_ray.counterfactual.ddim_inversion import invert
from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion
from diffva_ray.references.ddim import decode, noise_under
from diffva_ray.references.what_is_healthy import dynamic_normalisation


def generate(model: LatentDiffusion, request: Edit) -> Generated:
    """Edit a batch; prompts have no effect. Raises UnusableModel without a classifier."""
    classifier, scale = latent_classifier(model), request.config.classifier_guided.scale

    def predict(z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        shift = (1 - model.alphas[t]).sqrt() * gradient(classifier, z_t, model.on_device(t))
        return noise_under(model, z_t, t, request.empty) - scale * shift

    _, timesteps = model.schedule(request)
    encoded = invert(model, replace(request, source=request.empty), timesteps)
    return model.generated(decode(model, encoded, timesteps, predict, dynamic_normalisation(request)), request)
