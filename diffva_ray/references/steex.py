"""STEEX (Jacob et al. 2022, "STEEX: steering counterfactual explanations with semantics"; method ``steex``): optimise
the code z of a generative model inside a region, so that a classifier f calls the decoded image healthy (equation 4),

    z* = argmin_z - log p(healthy | f(G(z))) + proximity |z - z_0|^2,    over the cells of the region alone,

by Adam, with one step for each step of the sampler. The region is the lungs (the image where there is no mask).

Differences: the authors' codes are styles of a semantic GAN, one for each region of a segmentation; ours are the
autoencoder's latents, which are local as they are. ``generate.references.proximity`` and ``learning_rate`` are ours.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion
from diffva_ray.references.image_classifier import classifier_of


def generate(model: LatentDiffusion, request: Edit) -> Generated:
    """Edit a batch, each image by itself; prompts have no effect. Raises UnusableModel without a classifier."""
    classifier, config = classifier_of(model), request.config.references
    cells = functional.adaptive_max_pool2d(request.lungs[:, None].float(), tuple(request.latents.shape[2:]))
    with torch.inference_mode(False), torch.enable_grad():
        own, where = request.latents.clone(), cells.clone()
        z = own.clone().requires_grad_()
        optimizer = torch.optim.Adam([z], lr=config.learning_rate, foreach=False)
        for _ in range(int(request.settings.num_inference_steps * request.settings.strength)):
            inside = torch.lerp(own, z, where)
            unhealthy = functional.softplus(classifier.log_odds(model.decode(inside)))  # - log p(healthy)
            loss = unhealthy.sum() + config.proximity * (inside - own).square().sum()
            (z.grad,) = torch.autograd.grad(loss, z)
            optimizer.step()
        found = torch.lerp(own, z, where).detach()
    return model.generated(found, request)
