"""Classifier of noisy latents that guides the method ``classifier-guided``: the downsampling half of a UNet (Dhariwal &
Nichol 2021, section 4.1). The judge, which scores counterfactuals, is another network.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d_blocks import DownBlock2D, UNetMidBlock2D
from torch import nn


class LatentClassifier(ModelMixin, ConfigMixin):
    """Network that returns logits over ``classes`` for latents at any noise level.

    ``healthy`` is the target class of the guidance. Raises ValueError when ``healthy`` is not in ``classes``.
    """

    @register_to_config  # type: ignore[untyped-decorator]  # of diffusers
    def __init__(
        self,
        classes: Sequence[str],
        healthy: str,
        in_channels: int = 4,
        block_out_channels: Sequence[int] = (32, 64, 64),
        norm_num_groups: int = 8,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of diffusers
        if healthy not in classes:
            raise ValueError(f"the healthy class {healthy!r} is none of {', '.join(classes)}")
        # embedding of the timestep
        first, last = block_out_channels[0], block_out_channels[-1]
        self.time = Timesteps(first, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(first, 4 * first)
        # downsampling blocks
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        self.down = nn.ModuleList()
        for n, out in enumerate(block_out_channels):
            self.down.append(
                DownBlock2D(
                    block_out_channels[max(n - 1, 0)],
                    out,
                    temb_channels=4 * first,
                    resnet_groups=norm_num_groups,
                    add_downsample=n + 1 < len(block_out_channels),
                )
            )
        # middle block and head
        self.mid = UNetMidBlock2D(last, 4 * first, resnet_groups=norm_num_groups, attention_head_dim=last)
        self.norm = nn.GroupNorm(norm_num_groups, last)
        self.head = nn.Linear(2 * last, len(classes))

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the logits."""
        return tuple(self.config["classes"])

    @property
    def healthy(self) -> str:
        """Name of the healthy class."""
        return str(self.config["healthy"])

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Logits [n, classes] of latents [n, channels, h, w] noised to ``timesteps`` ([n], or one for all rows)."""
        embedding = self.time_embedding(self.time(timesteps.expand(len(latents))).to(latents))
        maps = self.conv_in(latents)
        for block in self.down:
            maps, _ = block(maps, embedding)
        maps = nn.functional.silu(self.norm(self.mid(maps, embedding)))
        logits: torch.Tensor = self.head(torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1))
        return logits

    def log_healthy(self, latents: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """log p(healthy | latents, timestep) [n]."""
        return self.forward(latents, timesteps).log_softmax(dim=1)[:, self.classes.index(self.healthy)]
