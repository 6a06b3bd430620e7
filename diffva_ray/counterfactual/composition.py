"""Composed prompts as guidance: each further text adds its own direction to the noise prediction.

Composable diffusion (Liu et al. 2022, "Compositional Visual Generation with Composable Diffusion Models", equation 11
for the conjunction): eps = eps_u + sum_i w_i (eps_i - eps_u), with w_i < 0 for a negation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from diffva_ray.config.prompts import Part, check_composed, parts
from diffva_ray.config.sampling import SamplingSettings

Further = tuple[torch.Tensor, torch.Tensor]  # embedding [n, length, width], weight [n, 1, 1, 1]


def embedded(
    prompts: Sequence[Any], embed: Callable[[Any], torch.Tensor], settings: SamplingSettings
) -> tuple[torch.Tensor, tuple[Further, ...]]:
    """Embeddings [n, length, width] of the prompts' first texts, and the further ones, of which a prompt with fewer
    texts than another has empty ones of weight 0. Raises ValueError for settings that cannot compose."""
    whole = [parts(prompt) if isinstance(prompt, str) else (prompt,) for prompt in prompts]  # a mixture is one part
    for prompt in dict.fromkeys(prompt for prompt in prompts if isinstance(prompt, str)):
        check_composed(prompt, settings)

    def of(part: Any) -> torch.Tensor:
        if not isinstance(part, Part):
            return embed(part)
        first = embed(part.text)
        return first if part.towards is None else torch.lerp(first, embed(part.towards), part.amount)

    further = []
    for n in range(1, max(map(len, whole))):
        chosen = [found[n] if len(found) > n else Part("", 0.0) for found in whole]
        embedding = torch.cat([of(part) for part in chosen])
        weights = torch.tensor([part.weight for part in chosen], device=embedding.device)
        further.append((embedding, weights[:, None, None, None]))
    return torch.cat([of(found[0]) for found in whole]), tuple(further)
