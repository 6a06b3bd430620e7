"""Sanchez et al. 2022, "What is healthy? Generative counterfactual diffusion for lesion localization" (method
``what-is-healthy``): encode the image by DDIM with the unconditional model, decode under guidance to the healthy class
without a classifier, with dynamic normalisation of the predicted clean image in every step.

Dynamic normalisation clips every channel of the prediction at a quantile of its absolute values
(``generate.references.quantile``, 0.99 as in the authors' code) and scales it back to the range of an image, because
strong guidance saturates. Their images fill [-1, 1]; the range of latents is that of the image's own latents, channel
by channel.

Differences: latents; the class is a prompt that the UNet reads by cross-attention, as their label embedding is. Method
``ddim-inversion`` is the same without the normalisation, and encodes under a source prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from diffva_ray.counterfactual.ddim_inversion import invert
from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion, split
from diffva_ray.references.ddim import decode


def generate(model: LatentDiffusion, request: Edit) -> Generated:
    """Edit a batch; guidance is away from the empty prompt, and the source prompt has no effect."""
    plain = replace(request, source=request.empty, negative=request.empty)

    def predict(z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return split(model.guided(z_t, t, plain), z_t, model.alphas[t], model.prediction_type)[1]

    _, timesteps = model.schedule(request)
    encoded = invert(model, plain, timesteps)
    return model.generated(decode(model, encoded, timesteps, predict, dynamic_normalisation(request)), request)


def dynamic_normalisation(request: Edit) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function that normalises predicted clean latents [n, 4, h, w] to the range of the images' own."""

    def reach(latents: torch.Tensor) -> torch.Tensor:
        sizes = latents.abs().flatten(2).sort(dim=2).values
        return sizes[:, :, int(request.config.references.quantile * (sizes.shape[2] - 1)), None, None]

    own = reach(request.latents)

    def normalise(z_0: torch.Tensor) -> torch.Tensor:
        limit = torch.maximum(reach(z_0), own)
        return z_0.clamp(-limit, limit) * (own / limit)

    return normalise
