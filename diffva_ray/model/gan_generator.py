"""The generator of the GANs among the reference systems: it maps an image to its healthy counterfactual in pixel
space and in one pass, without text, noise or autoencoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.unets.unet_2d_blocks import DownBlock2D, UNetMidBlock2D, UpBlock2D
from torch import nn

NO_TIME: Any = None  # width of the time embedding, which is optional in diffusers' blocks
RESNETS = 2  # layers of an upsampling block, one for every skip connection


class GanGenerator(ModelMixin, ConfigMixin):
    """A U-Net on grey images.

    With ``mode`` "map" the network computes an additive map, counterfactual = image + M(image) (Baumgartner et al.
    2018); with "image" it computes the counterfactual itself. ``measured`` stores training results for information.
    Input channels after the first are conditions.
    """

    @register_to_config  # type: ignore[untyped-decorator]  # of diffusers
    def __init__(
        self,
        mode: Literal["map", "image"] = "map",
        block_out_channels: Sequence[int] = (16, 32, 64),
        norm_num_groups: int = 8,
        measured: Mapping[str, float] | None = None,
        in_channels: int = 1,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of diffusers
        if mode not in ("map", "image"):
            raise ValueError(f"mode {mode!r} is neither map nor image")
        # downsampling blocks
        channels, last = list(block_out_channels), len(block_out_channels) - 1
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for n, out in enumerate(channels):
            self.down.append(
                DownBlock2D(
                    channels[max(n - 1, 0)], out, NO_TIME, resnet_groups=norm_num_groups, add_downsample=n < last
                )
            )
        # middle and upsampling blocks, output
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
        """Counterfactuals [n, 1, H, W] of images [n, in_channels, H, W] in [-1, 1]; with mode "map" they may exceed
        that range. H and W must be multiples of 2^(blocks - 1)."""
        maps = self.conv_in(images)
        kept = [maps]
        for block in self.down:
            maps, skips = block(maps)
            kept += skips
        maps = self.mid(maps)
        for block in self.up:
            skips, kept = tuple(kept[-RESNETS:]), kept[:-RESNETS]
            maps = block(maps, skips)
        output: torch.Tensor = self.conv_out(nn.functional.silu(self.norm(maps)))
        return images[:, :1] + output if self.config["mode"] == "map" else output.tanh()

    def generate(self, images: torch.Tensor) -> torch.Tensor:
        """Grey counterfactuals [n, H, W] in [0, 1] of grey images [n, H, W] in [0, 1]."""
        pixels = images[:, None].to(self.conv_in.weight.dtype) * 2 - 1
        return (self.forward(pixels)[:, 0].float() / 2 + 0.5).clamp(0, 1)
