"""Text input of the UNet: its width, a projection to that width, and the weights that read the text."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from diffva_ray.model.card import UnusableModel

READS_PROMPTS = (".attn2.to_k.", ".attn2.to_v.")  # diffusers' names; attn1 is self-attention


def text_width(unet: Any) -> int:
    """Width of the text embeddings that a UNet2DConditionModel takes.

    Raises UnusableModel for UNets that need more than one embedding of a prompt (SDXL, Kandinsky).
    """
    config = unet.config
    other = config.encoder_hid_dim_type not in (None, "text_proj") or not isinstance(config.cross_attention_dim, int)
    if other or config.addition_embed_type or config.class_embed_type or config.num_class_embeds:
        raise UnusableModel("the base's UNet takes more than one embedding of a prompt; use Stable Diffusion 1 or 2")
    return int(config.encoder_hid_dim or config.cross_attention_dim)


def fit_text_width(unet: Any, width: int, seed: int) -> None:
    """Adapts the UNet to text embeddings of ``width``, with a projection when the cross-attentions have another width.

    The projection is diffusers' own (``encoder_hid_dim_type: text_proj``), a linear layer in front of all
    cross-attentions. It is initialised as a random semi-orthogonal matrix (from ``seed``), which treats all directions
    of the text space equally and spreads the few large components of BERT and CLIP states. The gain keeps the mean
    square per component, as the keys and values after it were trained on. No other weight changes.
    """
    if text_width(unet) == width:
        return
    inner = unet.config.cross_attention_dim
    if width == inner:  # remove the projection of a previous text encoder
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
    """Weights that read the prompt, by name: keys and values of every cross-attention, and the projection.

    After the text encoder was replaced, train them first and alone: no other weights depended on the old encoder.
    """
    return {
        name: parameter
        for name, parameter in unet.named_parameters()
        if name.startswith("encoder_hid_proj.") or any(part in f".{name}" for part in READS_PROMPTS)
    }
