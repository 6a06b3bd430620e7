"""Stage ``autoencoder``: trains the whole autoencoder of a small model, or only the decoder of a pretrained base, whose
UNet depends on the latents staying as they are.

With an adversary the loss is the paper's L_Autoencoder (Rombach et al. 2022, equation 25): reconstruction, adversarial
loss, and a KL term that keeps latents near N(0, 1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffva_ray.config.stages import AutoencoderConfig
from diffva_ray.train.adversary import PatchDiscriminator, adaptive_weight, feature_matching, frozen, hinge_loss
from diffva_ray.train.loss import autoencoder_loss
from diffva_ray.train.sampling import ImageOrder, grey
from diffva_ray.train.stage import Batch, Inputs, Stage, StageContext, Trainable, Worker, three_channels


class AutoencoderStage(Stage):
    """Trains the autoencoder and its optional adversary. At the end, sets ``scaling_factor`` to 1 / std of the latents,
    as Stable Diffusion does, unless only the decoder was trained."""

    config: AutoencoderConfig

    def __init__(self, context: StageContext, config: AutoencoderConfig) -> None:
        super().__init__(context, config)
        self.order = ImageOrder(context.images.images, config.classes, context.seed)
        self.vae = context.bundle.vae
        self.trainables = [Trainable("autoencoder", _Autoencoder(self.vae), self.inputs, self.loss)]
        self.adversary: PatchDiscriminator | None = None
        if config.adversarial_weight or config.perceptual_weight:
            torch.manual_seed(context.seed)
            self.adversary = PatchDiscriminator()
            self.modules = {f"adversary-{config.name}": self.adversary}
            self.trainables.append(Trainable("adversary", self.adversary, self.inputs, self.adversary_loss))

    def begin(self, worker: Worker) -> None:
        self.vae.requires_grad_(self.config.part == "all")
        self.vae.decoder.requires_grad_(True)
        if self.vae.post_quant_conv is not None:
            self.vae.post_quant_conv.requires_grad_(True)
        if self.adversary is not None:
            self.adversary.to(worker.device).requires_grad_(True)

    def inputs(self, batch: Batch) -> Inputs:
        """Return the images, uint8 [n, H, W], and the noise to sample their posteriors with."""
        images = self.context.images
        side = images.size // self.context.bundle.latent_scale
        return {
            "pixels": images.stack([self.order[position] for position in batch.positions()]),
            "noise": batch.random.normal(self.vae.config.latent_channels, side, side),
            "step": batch.step,
        }

    def loss(self, network: nn.Module, inputs: Inputs) -> torch.Tensor:
        """Loss of the autoencoder; the adversarial terms join at step ``adversarial_start``."""
        pixels, noise = three_channels(grey(inputs["pixels"])), inputs["noise"]
        reconstruction, mean, logvar = network(pixels, noise)
        config = self.config
        loss = autoencoder_loss(reconstruction, pixels, mean, logvar, config.kl_weight, config.gradient_weight)
        if self.adversary is None or inputs["step"] < config.adversarial_start:
            return loss
        # The adversary is a fixed function here; ``adversary_loss`` trains it.
        with frozen(self.adversary) as adversary:
            fake, fake_features = adversary(reconstruction)
            if config.perceptual_weight:
                real_features = adversary(pixels)[1]
                loss = loss + config.perceptual_weight * feature_matching(real_features, fake_features)
            if config.adversarial_weight:
                fooled = -fake.mean()
                weight = adaptive_weight(loss, fooled, self.vae.decoder.conv_out.weight)
                loss = loss + config.adversarial_weight * weight * fooled
        return loss

    def adversary_loss(self, network: nn.Module, inputs: Inputs) -> torch.Tensor:
        """Hinge loss of the adversary on images and their reconstructions."""
        pixels = three_channels(grey(inputs["pixels"]))
        with torch.no_grad():
            fake = self.trainables[0].network(pixels, inputs["noise"])[0]
        logits = network(torch.cat([pixels, fake]))[0]
        return hinge_loss(*logits.chunk(2))

    @torch.no_grad()
    def finish(self, device: torch.device) -> None:
        if self.config.part == "decoder":
            return
        self.context.autoencoders += 1
        images = self.context.images
        sample = range(0, len(images.images), max(1, len(images.images) // 256))
        latents = torch.cat(
            [self.vae.encode(three_channels(images.batch([n])).to(device)).latent_dist.mean.cpu() for n in sample]
        )
        self.vae.register_to_config(scaling_factor=round(1.0 / latents.std().item(), 5))


class _Autoencoder(nn.Module):
    """Encoder, sampling and decoder behind one forward, so that DDP sees one module."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(self, pixels: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        posterior = self.vae.encode(pixels).latent_dist
        latents = posterior.mean + posterior.std * noise
        return self.vae.decode(latents).sample, posterior.mean, posterior.logvar
