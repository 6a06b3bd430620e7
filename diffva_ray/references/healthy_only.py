"""Partial diffusion with a model that has seen healthy images only; neither method knows what a disease is.

``anoddpm`` (Wyatt et al. 2022, "AnoDDPM: anomaly detection with denoising diffusion probabilistic models using simplex
noise"): noise the image to an intermediate level, denoise it with the DDPM sampler; what the model has never seen does
not come back. The authors' noise has several octaves; so has ours (``noise_octaves`` of the stage, 0: white noise), as
sums of upsampled Gaussian fields instead of simplex noise.

``autoddpm`` (Bercea et al. 2023, "Mask, stitch, and re-sample"): mask what ``anoddpm`` changed most, stitch its result
into the image there, and denoise the stitched latents again from a lower level (a quarter of the first, as their 50 of
200), with the image's own noised latents outside the mask after every step.

Differences: latents instead of pixels. The mask is a quantile of the change of the latents
(``generate.references.mask_quantile``) instead of a residual times a perceptual distance, and the second pass runs
once, where theirs jumps back five times.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import nn
from torch.nn import functional

from diffva_ray.config.recipe import RecipeError
from diffva_ray.config.reference_stages import HealthyDenoiserConfig
from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion, noise
from diffva_ray.references.ddim import decode
from diffva_ray.train.latents import latents_of
from diffva_ray.train.sampling import ImageOrder
from diffva_ray.train.stage import Batch, Inputs, Stage, StageContext, Trainable, Worker


def anoddpm(model: LatentDiffusion, request: Edit) -> Generated:
    """Replace by the healthy-only model what it cannot represent. Raises UnusableModel without it."""
    return model.generated(_partial(model, request)[0], request)


def autoddpm(model: LatentDiffusion, request: Edit) -> Generated:
    """``anoddpm``, then its change where it is largest, blended by a second pass. Raises UnusableModel without it."""
    own = request.latents
    first, timesteps, noises = _partial(model, request)

    # Mask.
    change = functional.avg_pool2d((first - own).abs().mean(1, keepdim=True), 3, 1, 1, count_include_pad=False)
    sizes = change.flatten(1).sort(dim=1).values
    limit = sizes[:, int(request.config.references.mask_quantile * (sizes.shape[1] - 1))]
    mask = (change > limit[:, None, None, None]).to(own)

    # Stitch, noise to the lower level, and denoise; outside the mask the image's own latents, noised to each level.
    tail = timesteps[-max(1, len(timesteps) // 4) :]
    alpha, eps = model.alphas[tail[0]], noises[0]
    stitched = mask * first + (1 - mask) * own
    z = decode(
        model,
        alpha.sqrt() * stitched + (1 - alpha).sqrt() * eps,
        tail,
        _healthy_noise(model),
        noises=noises[-len(tail) :],
        after=lambda made, level: mask * made + (1 - mask) * (level.sqrt() * own + (1 - level).sqrt() * eps),
    )
    return model.generated(mask * z + (1 - mask) * own, request)


def _partial(model: LatentDiffusion, request: Edit) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The latents after partial diffusion, the timesteps, and the noises [steps + 1, n, 4, h, w]: of the first level,
    and of each step."""
    network = _healthy_unet(model)
    _, timesteps = model.schedule(request)
    n, *shape = request.latents.shape
    drawn = torch.Size([n, len(timesteps) + 1, int(network.config.noise_octaves) + 1, *shape])
    noises = octaves(noise(drawn, request.generators).to(request.latents)).transpose(0, 1)
    alpha = model.alphas[timesteps[0]]
    z = alpha.sqrt() * request.latents + (1 - alpha).sqrt() * noises[0]
    return decode(model, z, timesteps, _healthy_noise(model), noises=noises[1:]), timesteps, noises


def _healthy_unet(model: LatentDiffusion) -> Any:
    network, like = model.bundle.extra("healthy_unet"), next(model.unet.parameters())
    return network.to(like.device, like.dtype).eval().requires_grad_(False)


def _healthy_noise(model: LatentDiffusion) -> Any:
    network = _healthy_unet(model)
    return lambda z_t, t: network(z_t.to(network.dtype), model.on_device(t)).sample.float()


def octaves(white: torch.Tensor) -> torch.Tensor:
    """Noise of unit variance [..., c, h, w] with structure at several scales, of white noise [..., octaves + 1, c, h,
    w]: the first as it is, the others averaged over blocks of 2, 4, 8 ... cells."""
    first, *coarser = white.unbind(-4)
    total = first.flatten(0, -4)
    for octave, fine in enumerate(coarser, 1):
        blocks = functional.avg_pool2d(fine.flatten(0, -4), 2**octave) * 2**octave
        total = total + functional.interpolate(blocks, size=fine.shape[-2:], mode="nearest")
    scaled: torch.Tensor = total / (len(coarser) + 1) ** 0.5
    return scaled.reshape(first.shape)


class HealthyDenoiserStage(Stage):
    """Trains the unconditional UNet on the latents of healthy images alone, after the autoencoder's stage: the mean
    squared error of the predicted noise (Ho et al. 2020, equation 14)."""

    config: HealthyDenoiserConfig

    def __init__(self, context: StageContext, config: HealthyDenoiserConfig) -> None:
        super().__init__(context, config)
        bundle, unet = context.bundle, context.bundle.unet.config
        self.order = ImageOrder(context.images.images, {bundle.recipe.data.healthy_class: 1}, context.seed)
        self.latents = latents_of(context, context.images)
        self.noise_scheduler = DDPMScheduler.from_config(bundle.scheduler)
        if self.latents.side % 2**config.noise_octaves:
            raise RecipeError(
                f"stage {config.name}: noise_octaves {config.noise_octaves} do not fit latents of side "
                f"{self.latents.side}; give fewer"
            )
        torch.manual_seed(context.seed)
        levels, channels = len(unet.block_out_channels), bundle.vae.config.latent_channels
        kind: Any = UNet2DModel  # diffusers has no types
        self.network = kind(
            sample_size=self.latents.side,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=unet.block_out_channels,
            layers_per_block=unet.layers_per_block,
            norm_num_groups=unet.norm_num_groups,
            down_block_types=["DownBlock2D"] * (levels - 1) + ["AttnDownBlock2D"],
            up_block_types=["AttnUpBlock2D"] + ["UpBlock2D"] * (levels - 1),
        )
        self.network.register_to_config(noise_octaves=config.noise_octaves)
        bundle.extras["healthy_unet"] = self.network
        self.modules = {"healthy_unet": self.network}
        self.trainables = [Trainable("healthy_unet", self.network, self.inputs, self.loss)]

    def begin(self, worker: Worker) -> None:
        self.network.requires_grad_(True)

    def fill(self, device: torch.device) -> None:
        self.latents.fill(device)

    def inputs(self, batch: Batch) -> Inputs:
        """Return the healthy images, noise and timesteps of a share."""
        random, shape = batch.random, self.latents.shape
        posterior_noise, white = random.normal(*shape), random.normal(self.config.noise_octaves + 1, *shape)
        return {
            "images": self.latents.inputs([self.order[position] for position in batch.positions()]),
            "posterior_noise": posterior_noise,
            "noise": octaves(white),
            "timesteps": random.integers(self.noise_scheduler.config.num_train_timesteps),
        }

    def loss(self, network: nn.Module, inputs: Inputs) -> torch.Tensor:
        mean, std = self.latents.moments(inputs["images"])
        latents = (mean + std * inputs["posterior_noise"]) * self.context.bundle.vae.config.scaling_factor
        noisy = self.noise_scheduler.add_noise(latents, inputs["noise"], inputs["timesteps"])
        output: torch.Tensor = network(noisy, inputs["timesteps"]).sample
        return functional.mse_loss(output.float(), inputs["noise"])
