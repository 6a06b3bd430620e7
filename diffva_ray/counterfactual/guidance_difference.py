"""Where two prompts disagree about an image: the difference of the noise that the model predicts under each. DiffEdit
makes its mask of it (Couairon et al. 2023, section 3.2); it is also an attribution by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffva_ray.counterfactual.latent_diffusion import LatentDiffusion, split
from diffva_ray.counterfactual.noising import noised

TIMESTEPS = (0.3, 0.4, 0.5)  # of the training schedule; DiffEdit noises to half of it
CALLS = 2 * len(TIMESTEPS)  # network calls; equals MASK_CALLS of generate/cost.py, which must not load torch


def guidance_difference(
    model: LatentDiffusion,
    latents: torch.Tensor,
    healthy: torch.Tensor,
    source: torch.Tensor,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """mean |eps(healthy) - eps(source)| over channels and timesteps: [n, h, w], not negative.

    ``latents`` [n, 4, h, w]; embeddings [n, length, width]; noise from each image's own generator. Costs CALLS network
    calls.
    """
    total = torch.zeros_like(latents[:, 0])
    for fraction in TIMESTEPS:
        z_t, _, t, alpha_bar = noised(model, latents, fraction, generators)
        eps_healthy, eps_source = (
            split(model.predict(z_t, t, embedding), z_t, alpha_bar, model.prediction_type)[1]
            for embedding in (healthy, source)
        )
        total += (eps_healthy - eps_source).abs().mean(dim=1)
    return total / len(TIMESTEPS)
