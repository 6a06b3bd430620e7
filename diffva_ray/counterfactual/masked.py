"""``masked``: DDIM inversion and generating, confined to a mask; everything outside it stays the image's own.

The mask is the lungs, is derived from the two prompts' difference of noise as in DiffEdit (Couairon et al. 2023), or is
where the generated image differs. The first two are known beforehand: outside them the inverted latents of the image
are put back after every step (DiffEdit, section 3.3). In pixels the counterfactual is blended in softly, weight 0
outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from diffva_ray.config.generation import MaskedConfig
from diffva_ray.counterfactual.ddim_inversion import inversion_path
from diffva_ray.counterfactual.guidance_difference import guidance_difference
from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion


def generate(model: LatentDiffusion, request: Edit) -> Generated:
    """The generated image inside the mask, the image itself outside it."""
    config = request.config.masked
    scheduler, timesteps = model.schedule(request)
    path = inversion_path(model, request, timesteps)
    if config.source == "difference":
        generated = model.generated(model.denoise(path[0], request, scheduler, timesteps), request)
        weight = grown(differing(generated, config), config.dilation)  # soft already
    else:
        weight = soften(given(model, request), config)
        generated = model.generated(confined(model, request, scheduler, timesteps, path, weight), request)
    return Generated(
        blend(weight, generated.counterfactuals, request.images),
        blend(weight, generated.reconstructions, request.images),
    )


def given(model: LatentDiffusion, request: Edit) -> torch.Tensor:
    """The mask known before anything is generated, 0 or 1 [n, size, size]: the lungs, or DiffEdit's."""
    config = request.config.masked
    if config.source == "lungs":
        return request.lungs.float()
    cells = guidance_difference(model, request.latents, request.prompt, request.source, request.generators)
    smooth = functional.interpolate(cells[:, None], size=request.images.shape[1:], mode="bilinear")[:, 0]
    thresholds = smooth.flatten(1).quantile(config.quantile, dim=1)
    return (smooth > thresholds[:, None, None]).float()


def differing(generated: Generated, config: MaskedConfig) -> torch.Tensor:
    """The weight [n, size, size] in [0, 1] of how much generating changed: 0 up to ``keep_below``, 1 from
    ``edit_above``.

    The change is smoothed first, by as much as the mask is feathered: single pixels are noise.
    """
    change = feathered(generated.reconstructions - generated.counterfactuals, config.feather).abs()
    return ((change - config.keep_below) / (config.edit_above - config.keep_below)).clamp(0, 1)


def confined(
    model: LatentDiffusion,
    request: Edit,
    scheduler: Any,
    timesteps: torch.Tensor,
    path: list[torch.Tensor],
    weight: torch.Tensor,
) -> torch.Tensor:
    """Latents denoised under guidance in the cells that hold any ``weight``; the others follow the image's own path."""
    cells = functional.adaptive_max_pool2d(weight[:, None], tuple(request.latents.shape[2:])) > 0
    latents = path[0]
    for timestep, own in zip(timesteps, [*path[1:], request.latents], strict=True):
        latents = scheduler.step(model.guided(latents, timestep, request), timestep, latents).prev_sample
        latents = torch.where(cells, latents, own)
    return latents


def soften(weight: torch.Tensor, config: MaskedConfig) -> torch.Tensor:
    """``weight`` [n, size, size] grown by ``dilation`` and, so that no seam shows, falling off over twice ``feather``
    beyond that; exactly 0 further out."""
    return feathered(grown(weight, config.dilation + config.feather), config.feather).clamp(0, 1)


def grown(weight: torch.Tensor, fraction: float) -> torch.Tensor:
    """The largest weight within ``fraction`` of the width (a square)."""
    radius = round(fraction * weight.shape[-1])
    return functional.max_pool2d(weight[:, None], 2 * radius + 1, stride=1, padding=radius)[:, 0]


def feathered(images: torch.Tensor, fraction: float) -> torch.Tensor:
    """Images [n, size, size] under a window of compact support that reaches ``fraction`` of the width: two box means,
    which leave what is constant within reach as it is, zeros as zeros."""
    radius = round(fraction * images.shape[-1] / 2)
    for _ in range(2):
        padded = functional.pad(images[:, None], (radius,) * 4, mode="replicate")
        images = functional.avg_pool2d(padded, 2 * radius + 1, stride=1)[:, 0]
    return images


def blend(weight: torch.Tensor, inside: torch.Tensor, outside: torch.Tensor) -> torch.Tensor:
    """``inside`` by its weight, ``outside`` by the rest: bit for bit ``outside`` where the weight is 0."""
    return weight * inside + (1 - weight) * outside
