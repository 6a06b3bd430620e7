"""UNets that also read the image to edit: its latents stand beside the noisy latents, in twice the input channels
(InstructPix2Pix, Brooks et al. 2023, section 3.2). Zeros in their place mean "no image"."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def reads_image(unet: Any) -> bool:
    """Whether the UNet has input channels for the latents of an image."""
    config = getattr(unet, "config", None)  # a network of one's own may have none
    return config is not None and bool(config.in_channels == 2 * config.out_channels)


def add_image_channels(unet: Any) -> None:
    """Add input channels for the latents of an image. Their weights are zero, so the UNet's output does not change yet,
    as at the start of InstructPix2Pix's training."""
    old = unet.conv_in
    new = nn.Conv2d(2 * old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding)
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, : old.in_channels] = old.weight
    new.bias = old.bias
    unet.conv_in = new.to(old.weight)
    unet.register_to_config(in_channels=new.in_channels)


def with_image(unet: Any, latents: torch.Tensor, image: torch.Tensor | None = None) -> torch.Tensor:
    """Return the UNet's input: ``latents`` [n, c, h, w], and beside them, where the UNet reads it, the ``image``'s
    latents of the same shape (not scaled, as in diffusers' pipeline), or zeros without one."""
    if not reads_image(unet):
        return latents
    return torch.cat([latents, torch.zeros_like(latents) if image is None else image.to(latents)], dim=1)
