"""Latents of training images, encoded once where memory allows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from diffva_ray.progress import LOG
from diffva_ray.train.sampling import ImageSet, grey
from diffva_ray.train.stage import Inputs, StageContext, three_channels

ENCODING_BATCH_SIZE = 16  # images


def latents_of(context: StageContext, images: ImageSet) -> Latents:
    """The latents of an image set, the same object for all stages of a training."""
    found: Latents = context.shared.setdefault(id(images), Latents(context, images))
    return found


class Latents:
    """Posterior moments of images, computed once for the whole set if ``cache_megabytes`` allows it, otherwise in each
    step."""

    def __init__(self, context: StageContext, images: ImageSet) -> None:
        self.context, self.images = context, images
        self.vae: Any = context.bundle.vae
        self.side = images.size // context.bundle.latent_scale
        self.shape = (int(self.vae.config.latent_channels), self.side, self.side)
        megabytes = len(images.images) * 2 * 4 * self.shape[0] * self.side**2 / 2**20
        self.kept = megabytes <= context.cache_megabytes
        if not self.kept and context.cache_megabytes:
            LOG.info(
                "latents of %d images are encoded in every step: they need %.0f MB and train.cache_megabytes is %d",
                len(images.images), megabytes, context.cache_megabytes,
            )  # fmt: skip
        self._moments: tuple[torch.Tensor, torch.Tensor] | None = None
        self._autoencoder = -1  # with which ``_moments`` were encoded, as ``StageContext.autoencoders`` counts

    @torch.no_grad()
    def fill(self, device: torch.device) -> None:
        """Encode the whole set if it is kept, in batches that do not depend on the step, so that a resumed training has
        bitwise the same latents."""
        if not self.kept or self._autoencoder == self.context.autoencoders:
            return
        total = len(self.images.images)
        starts = range(0, total, ENCODING_BATCH_SIZE)
        parts = [
            self._encode(self.images.stack(range(n, min(n + ENCODING_BATCH_SIZE, total))).to(device)) for n in starts
        ]
        mean, std = (torch.cat([part[n].cpu() for part in parts]) for n in (0, 1))
        self._moments, self._autoencoder = (mean, std), self.context.autoencoders

    def inputs(self, indices: Sequence[int]) -> Inputs:
        """Return what ``moments`` needs of images: the moments themselves, or the pixels."""
        if not self.kept:
            return {"pixels": self.images.stack(indices)}
        if self._moments is None:
            raise RuntimeError("the latents of this set were not filled")
        mean, std = self._moments
        return {"mean": mean[list(indices)], "std": std[list(indices)]}

    @torch.no_grad()
    def moments(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation [n, 4, h, w] of the images' posteriors, from ``inputs`` on a device."""
        if "pixels" in inputs:
            return self._encode(inputs["pixels"])
        return inputs["mean"], inputs["std"]

    def _encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = self.vae.encode(three_channels(grey(pixels))).latent_dist
        return posterior.mean, posterior.std
