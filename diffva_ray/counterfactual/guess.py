"""What an image shows, as the model itself sees it: the prompt under which its noise is predicted best.

A zero-shot diffusion classifier (Li et al. 2023, "Your diffusion model is secretly a zero-shot classifier"). It needs
neither the image's label nor the judge; all prompts of an image meet the same noise, so their errors are paired.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffva_ray.counterfactual.latent_diffusion import LatentDiffusion, split
from diffva_ray.counterfactual.noising import noised

DRAWS = 2
TIMESTEPS = (0.1, 0.2, 0.3, 0.4)  # of the training schedule: late enough to hide detail, early enough to keep lesions


@torch.inference_mode()
def guess(
    model: LatentDiffusion, latents: torch.Tensor, embeddings: Sequence[torch.Tensor], seeds: Sequence[int]
) -> list[int]:
    """Index into ``embeddings`` ([1, length, width] each) for every image's latents [n, 4, h, w].

    Costs DRAWS * len(TIMESTEPS) * len(embeddings) network calls. Noise comes from generators of the guess's own.
    """
    generators = [torch.Generator("cpu").manual_seed((seed + 1) % 2**63) for seed in seeds]
    errors = torch.zeros(len(latents), len(embeddings), device=latents.device)
    for fraction in TIMESTEPS * DRAWS:
        noisy, fresh, timestep, alpha = noised(model, latents, fraction, generators)
        for column, embedding in enumerate(embeddings):
            output = model.predict(noisy, timestep, embedding.expand(len(latents), -1, -1))
            predicted = split(output, noisy, alpha, model.prediction_type)[1]
            errors[:, column] += ((predicted - fresh) ** 2).flatten(1).sum(1)
    return errors.argmin(dim=1).tolist()
