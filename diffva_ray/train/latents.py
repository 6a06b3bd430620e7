"""Latents of training images, encoded once where memory allows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from diffva_ray.train.sampling import ImageSet
from diffva_ray.train.stage import StageContext, three_channels

ENCODING_BATCH_SIZE = 16  # images


class Latents:
    """Posterior moments of images, computed once for the whole set if ``cache_megabytes`` allows it, otherwise in each
    step."""

    def __init__(self, context: StageContext, images: ImageSet) -> None:
        self.vae: Any = context.bundle.vae
        self.images = images
        side = images.size // context.bundle.latent_scale
        size = len(images.images) * 2 * 4 * self.vae.config.latent_channels * side**2
        self.kept = size <= context.cache_megabytes * 2**20
        self._moments: tuple[torch.Tensor, torch.Tensor] | None = None

    @torch.no_grad()
    def moments(self, indices: Sequence[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation [n, 4, h, w] of the images' posteriors. A cached set is encoded in batches
        that do not depend on the step, so that a resumed training has bitwise the same latents."""
        if not self.kept:
            return self._encode(indices, device)
        if self._moments is None:
            total = len(self.images.images)
            starts = range(0, total, ENCODING_BATCH_SIZE)
            parts = [self._encode(range(n, min(n + ENCODING_BATCH_SIZE, total)), device) for n in starts]
            mean, std = (torch.cat([part[n].cpu() for part in parts]) for n in (0, 1))
            self._moments = mean, std
        mean, std = self._moments
        return mean[list(indices)].to(device), std[list(indices)].to(device)

    def _encode(self, indices: Sequence[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = self.vae.encode(three_channels(self.images.batch(indices)).to(device)).latent_dist
        return posterior.mean, posterior.std
