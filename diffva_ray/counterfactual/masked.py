"""``masked``: DDIM inversion that edits inside a mask only; every pixel outside keeps the image's own value.

The mask is one of three: the lungs or the part of them that the prompt names, the difference of the predicted noise
under two prompts as in DiffEdit (Couairon et al. 2023), or the region where the edited image differs. The first two are
known before the edit, so after every step the cells outside are reset to the image's inverted latents (DiffEdit,
section 3.3). In pixels, the counterfactual is blended in with soft weights that are 0 outside the mask.
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
    """Edit a batch inside its masks; outside, counterfactual and reconstruction both equal the image."""
    config = request.config.masked
    scheduler, timesteps = model.schedule(request)

    # Invert to the chosen noise level.
    path = inversion_path(model, request, timesteps)

    if config.source == "difference":
        # Edit everywhere, then keep the edit where the image changed.
        generated = model.generated(model.denoise(path[0], request, scheduler, timesteps), request)
        weight = dilate(change_weight(generated, config), config.dilation)  # soft already
    else:
        # Edit inside a mask that is known beforehand.
        weight = soften(prior_mask(model, request), config)
        generated = model.generated(denoise_inside(model, request, scheduler, timesteps, path, weight), request)

    # Blend into the original image in pixel space.
    return Generated(
        blend(weight, generated.counterfactuals, request.images),
        blend(weight, generated.reconstructions, request.images),
    )


def prior_mask(model: LatentDiffusion, request: Edit) -> torch.Tensor:
    """Mask that is known before the edit, 0 or 1 [n, size, size]: the lungs, or DiffEdit's."""
    config = request.config.masked
    if config.source in ("lungs", "place"):
        return request.lungs.float()
    cells = guidance_difference(model, request.latents, request.prompt, request.source, request.generators)
    smooth = functional.interpolate(cells[:, None], size=request.images.shape[1:], mode="bilinear")[:, 0]
    thresholds = smooth.flatten(1).quantile(config.quantile, dim=1)
    return (smooth > thresholds[:, None, None]).float()


def change_weight(generated: Generated, config: MaskedConfig) -> torch.Tensor:
    """Weight [n, size, size] in [0, 1] by how much the edit changed: 0 up to ``keep_below``, 1 from ``edit_above``.

    The change is first smoothed as widely as the mask is feathered, because single changed pixels are noise.
    """
    change = feather(generated.reconstructions - generated.counterfactuals, config.feather).abs()
    return ((change - config.keep_below) / (config.edit_above - config.keep_below)).clamp(0, 1)


def denoise_inside(
    model: LatentDiffusion,
    request: Edit,
    scheduler: Any,
    timesteps: torch.Tensor,
    path: list[torch.Tensor],
    weight: torch.Tensor,
) -> torch.Tensor:
    """Denoise under guidance the latent cells that hold any ``weight``; all others follow the image's own ``path``."""
    cells = functional.adaptive_max_pool2d(weight[:, None], tuple(request.latents.shape[2:])) > 0
    z = path[0]
    for t, z_image in zip(timesteps, path[1:], strict=True):
        z = scheduler.step(model.guided(z, t, request), t, z).prev_sample
        z = torch.where(cells, z, z_image)
    return z


def soften(weight: torch.Tensor, config: MaskedConfig) -> torch.Tensor:
    """Dilate ``weight`` [n, size, size] by ``dilation``, then let it fall to exactly 0 over twice ``feather``, so that
    no seam is visible."""
    return feather(dilate(weight, config.dilation + config.feather), config.feather).clamp(0, 1)


def dilate(weight: torch.Tensor, fraction: float) -> torch.Tensor:
    """Largest weight within ``fraction`` of the width (a square window) of each pixel."""
    radius = round(fraction * weight.shape[-1])
    return functional.max_pool2d(weight[:, None], 2 * radius + 1, stride=1, padding=radius)[:, 0]


def feather(images: torch.Tensor, fraction: float) -> torch.Tensor:
    """Smooth images [n, size, size] by two box means that together reach ``fraction`` of the width.

    The window is compact: a pixel whose whole window is constant keeps its value, so zeros stay exact zeros.
    """
    radius = round(fraction * images.shape[-1] / 2)
    for _ in range(2):
        padded = functional.pad(images[:, None], (radius,) * 4, mode="replicate")
        images = functional.avg_pool2d(padded, 2 * radius + 1, stride=1)[:, 0]
    return images


def blend(weight: torch.Tensor, inside: torch.Tensor, outside: torch.Tensor) -> torch.Tensor:
    """Mix ``inside`` by its weight with ``outside``; bit for bit ``outside`` where the weight is 0."""
    return weight * inside + (1 - weight) * outside
