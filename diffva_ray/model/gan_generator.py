"""The generator of methods ``vant-gan`` and ``ant-gan``: an image goes in, its healthy counterfactual comes out, in
pixels and in one pass, without text, noise or autoencoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.unets.unet_2d_blocks import DownBlock2D, UNetMidBlock2D, UpBlock2D
from torch import nn

NO_TIME: Any = None  # width of the time embedding that diffusers' blocks may do without
RESNETS = 2  # of a block on the way up: one for every skip connection


class GanGenerator(ModelMixin, ConfigMixin):
    """A U-Net on grey images. ``mode`` "map" draws an additive map, generated = image + M(image) (Baumgartner et al.
    2018); "image" draws the generated image itself. ``measured`` is what its training found of it, for readers."""

    @register_to_config
    def __init__(
        self,
        mode: Literal["map", "image"] = "map",
        block_out_channels: Sequence[int] = (16, 32, 64),
        norm_num_groups: int = 8,
        measured: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        if mode not in ("map", "image"):
            raise ValueError(f"mode {mode!r} is neither map nor image")
        channels, last = list(block_out_channels), len(block_out_channels) - 1
        self.conv_in = nn.Conv2d(1, channels[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for n, out in enumerate(channels):
            self.down.append(
                DownBlock2D(
                    channels[max(n - 1, 0)], out, NO_TIME, resnet_groups=norm_num_groups, add_downsample=n < last
                )
            )
        self.mid = UNetMidBlock2D(channels[-1], NO_TIME, resnet_groups=norm_num_groups, add_attention=False)
        for n in range(last, -1, -1):
            self.up.append(
                UpBlock2D(
                    channels[max(n - 1, 0)],
                    channels[min(n + 1, last)],
                    channels[n],
                    NO_TIME,
                    num_layers=RESNETS,
                    resnet_groups=norm_num_groups,
                    add_upsample=n > 0,
                )
            )
        self.norm = nn.GroupNorm(norm_num_groups, channels[0])
        self.conv_out = nn.Conv2d(channels[0], 1, 3, padding=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Generated images [n, 1, H, W] of images [n, 1, H, W] in [-1, 1]; with mode "map" they may leave that range.
        Sides are multiples of 2 to the number of blocks but one."""
        maps = self.conv_in(images)
        kept = [maps]
        for block in self.down:
            maps, skips = block(maps)
            kept += skips
        maps = self.mid(maps)
        for block in self.up:
            skips, kept = tuple(kept[-RESNETS:]), kept[:-RESNETS]
            maps = block(maps, skips)
        drawn = self.conv_out(nn.functional.silu(self.norm(maps)))
        return images + drawn if self.config["mode"] == "map" else drawn.tanh()

    def generate(self, images: torch.Tensor) -> torch.Tensor:
        """Grey counterfactuals [n, H, W] in [0, 1] of grey images [n, H, W] in [0, 1]."""
        pixels = images[:, None].to(self.conv_in.weight.dtype) * 2 - 1
        return (self.forward(pixels)[:, 0].float() / 2 + 0.5).clamp(0, 1)
