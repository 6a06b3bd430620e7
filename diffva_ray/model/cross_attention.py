"""Where prompts enter the UNet: the width it takes, and the weights that read them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from diffva_ray.model.card import UnusableModel

READS_PROMPTS = (".attn2.to_k.", ".attn2.to_v.")  # diffusers' names; attn1 is self-attention


def text_width(unet: Any) -> int:
    """Width of the text embeddings a UNet2DConditionModel takes. Raises UnusableModel for UNets that want more than
    one plain embedding of a prompt (SDXL's, Kandinsky's)."""
    config = unet.config
    if config.encoder_hid_dim_type not in (None, "text_proj") or not isinstance(config.cross_attention_dim, int):
        raise UnusableModel("the base's UNet takes more than one embedding of a prompt; use a Stable Diffusion 1 or 2")
    return config.encoder_hid_dim or config.cross_attention_dim


def fit_text_width(unet: Any, width: int, seed: int) -> None:
    """Make the UNet take text embeddings of ``width``: diffusers' own projection (``encoder_hid_dim_type:
    text_proj``, a linear layer in front of all cross-attentions) where that is not its cross-attention's width.

    The projection starts as a random rotation (semi-orthogonal, seeded): no direction of the text's space is
    preferred or lost, a few outlying components of BERT and CLIP states are spread out, and the gain keeps the mean
    square per component, which is what the keys and values behind it were trained on. All other weights stay.
    """
    if text_width(unet) == width:
        return
    inner = unet.config.cross_attention_dim
    if width == inner:  # the base had a projection for another encoder
        unet.encoder_hid_proj = None
        unet.register_to_config(encoder_hid_dim=None, encoder_hid_dim_type=None)
        return
    projection = nn.Linear(width, inner)
    generator = torch.Generator().manual_seed(seed)
    nn.init.orthogonal_(projection.weight, gain=math.sqrt(max(1.0, inner / width)), generator=generator)
    nn.init.zeros_(projection.bias)
    unet.encoder_hid_proj = projection.to(unet.device, unet.dtype)
    unet.register_to_config(encoder_hid_dim=width, encoder_hid_dim_type="text_proj")


def cross_attention_parameters(unet: nn.Module) -> dict[str, nn.Parameter]:
    """What reads the prompt, by name: keys and values of every cross-attention, and the projection before them. To be
    trained first, alone, when the text encoder was swapped: they are the only weights that ever saw the old one."""
    return {
        name: parameter
        for name, parameter in unet.named_parameters()
        if name.startswith("encoder_hid_proj.") or any(part in f".{name}" for part in READS_PROMPTS)
    }
