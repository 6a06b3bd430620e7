"""Interpolation between two prompts, in the text embedding, and between two images, in latent space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from diffva_ray.counterfactual.ddim_inversion import invert
from diffva_ray.counterfactual.engine import Blend, CounterfactualBatch, CounterfactualEngine
from diffva_ray.counterfactual.latent_diffusion import Edit
from diffva_ray.data.images import to_square
from diffva_ray.schema import Image


def between_prompts(
    engine: CounterfactualEngine,
    image: Image,
    first: str,
    second: str,
    weights: Sequence[float],
    seed: int,
    lungs: NDArray[np.bool_] | None = None,
) -> CounterfactualBatch:
    """Counterfactuals of one image [H, W] in [0, 1] under prompts from ``first`` (weight 0) to ``second`` (weight 1).

    All come from the same noise by the recipe's method, with the lung mask [size, size] where there is one. At the ends
    they equal the engine's results for the two prompts."""
    prompts = [Blend(first, second, weight) for weight in weights]
    parts = []
    for start in range(0, len(prompts), engine.config.micro_batch):
        batch = prompts[start : start + engine.config.micro_batch]
        count = len(batch)
        parts.append(engine([image] * count, [seed] * count, batch, lungs=[lungs] * count))
    return CounterfactualBatch(
        np.concatenate([part.counterfactuals for part in parts]),
        np.concatenate([part.reconstructions for part in parts]),
        [prompt for part in parts for prompt in part.source_prompts],
        [in_float32 for part in parts for in_float32 in part.in_float32],
    )


@torch.inference_mode()
def between_images(
    engine: CounterfactualEngine, first: Image, second: Image, weights: Sequence[float], prompt: str | None = None
) -> Image:
    """Images [n, size, size] from ``first`` (weight 0) to ``second`` (weight 1), each [H, W] in [0, 1].

    Both are encoded by DDIM inversion to the recipe's strength, the noisy latents are interpolated on the sphere, and
    DDIM decodes each mixture (Song et al. 2021, section 5.3). Without a prompt nothing is edited, and the ends are
    reconstructions of the two images; with a prompt, DDIM decodes under guidance to it.
    """
    # Encode both images and invert them to the chosen noise level, under the empty prompt.
    config, model = engine.config, engine.model
    squares = torch.from_numpy(np.stack([to_square(image, engine.size) for image in (first, second)])).to(engine.device)
    latents = model.encode(squares)[0].float() * model.scale
    empty = engine.embed("").expand(2, -1, -1)
    ends = Edit(
        images=squares,
        lungs=torch.ones_like(squares, dtype=torch.bool),
        latents=latents,
        generators=[torch.Generator("cpu").manual_seed(0) for _ in range(2)],  # DDIM samples no noise
        prompt=empty,
        negative=empty,
        empty=empty,
        source=empty,
        settings=engine.settings.replace(scheduler="ddim", guidance_scale=1.0),
        config=config,
    )
    noisy = invert(model, ends, model.schedule(ends)[1])

    # Decode each mixture in a batch of one, so that an image does not depend on the number of weights.
    settings = ends.settings.replace(guidance_scale=config.guidance_scale if prompt else 1.0)
    request = replace(ends, prompt=engine.embed(prompt or ""), negative=engine.embed(""), settings=settings)
    images = []
    for weight in weights:
        mixed = slerp(noisy[:1], noisy[1:], weight)
        scheduler, timesteps = model.schedule(request)  # a new one each time: some schedulers count their steps
        images.append(model.decode(model.denoise(mixed, request, scheduler, timesteps)).cpu().numpy())
    return np.concatenate(images)


def slerp(first: torch.Tensor, second: torch.Tensor, weight: float) -> torch.Tensor:
    """Spherical interpolation of each row (Shoemake 1985), which keeps the norm: a mixture of noise is noise."""
    a, b = first.flatten(1).double(), second.flatten(1).double()
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    angle = torch.arccos(cosine.clamp(-1, 1))[:, None]
    if angle.max() < 1e-4:
        return torch.lerp(first, second, weight)
    mixed = (torch.sin((1 - weight) * angle) * a + torch.sin(weight * angle) * b) / torch.sin(angle)
    return mixed.to(first.dtype).reshape(first.shape)
