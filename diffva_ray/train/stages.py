"""What a stage trains: its network, its loss, and what is done with the result. One class per kind of stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import nn
from torch.nn import functional

from diffva_ray.config import StageConfig
from diffva_ray.metrics.validity import Judge, blur
from diffva_ray.model import text
from diffva_ray.model.bundle import Bundle
from diffva_ray.train.loss import autoencoder_loss, denoising_loss, min_snr_weights
from diffva_ray.train.sampling import Draws, FilmSet

ENCODING_BATCH = 16


def three_channels(films: torch.Tensor) -> torch.Tensor:
    """Grey films [n, H, W] in [0, 1] as the autoencoder wants them: [n, 3, H, W] in [-1, 1]."""
    return (films[:, None] * 2 - 1).expand(-1, 3, -1, -1)


def normal(shape: Sequence[int], generator: torch.Generator, like: torch.Tensor) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=generator).to(like.device)


class AutoencoderStage:
    """The autoencoder of a model from scratch; ends by setting ``scaling_factor`` to 1 / std, as Stable Diffusion's."""

    def __init__(self, bundle: Bundle, stage: StageConfig, films: FilmSet, seed: int) -> None:
        self.bundle, self.stage, self.films = bundle, stage, films
        self.network: nn.Module = _Autoencoder(bundle.vae)
        self.draws = Draws(films.films, stage.classes, seed)

    def set_trainable(self) -> None:
        self.network.requires_grad_(True)

    def loss(self, network: nn.Module, positions: range, rows: slice, generator: torch.Generator) -> torch.Tensor:
        """Loss of the global batch at ``positions``, restricted to this worker's ``rows``."""
        films = self.films.batch([self.draws[position] for position in positions[rows]])
        pixels = three_channels(films.to(next(network.parameters()).device))
        side = pixels.shape[-1] // self.bundle.latent_scale
        channels = self.bundle.vae.config.latent_channels
        noise = normal((len(positions), channels, side, side), generator, pixels)[rows]
        reconstruction, mean, logvar = network(pixels, noise)
        return autoencoder_loss(reconstruction, pixels, mean, logvar, self.stage.kl_weight, self.stage.gradient_weight)

    @torch.no_grad()
    def finish(self, device: torch.device) -> None:
        sample = range(0, len(self.films.films), max(1, len(self.films.films) // 256))
        latents = torch.cat(
            [
                self.bundle.vae.encode(three_channels(self.films.batch([n])).to(device)).latent_dist.mean.cpu()
                for n in sample
            ]
        )
        self.bundle.vae.register_to_config(scaling_factor=round(1.0 / latents.std().item(), 5))


class _Autoencoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(self, pixels: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        posterior = self.vae.encode(pixels).latent_dist
        latents = posterior.mean + posterior.std * noise
        return self.vae.decode(latents).sample, posterior.mean, posterior.logvar


class DenoiserStage:
    """UNet and text encoder together: noise prediction under the class's prompt, prompts dropped to "" at a rate so
    that guidance has a trained unconditional branch, and DreamBooth's prior preservation when a class set is named."""

    def __init__(self, bundle: Bundle, stage: StageConfig, films: FilmSet, seed: int, cache_latents: bool) -> None:
        self.bundle, self.stage, self.films = bundle, stage, films
        self.network: nn.Module = _Denoiser(bundle.unet, bundle.text_encoder)
        self.draws = Draws(films.films, stage.classes, seed)
        self.prior = Draws(films.films, {stage.prior_class: 1}, seed + 1) if stage.prior_class else None
        self.noise_scheduler = DDPMScheduler.from_config(bundle.scheduler)
        self.cache_latents = cache_latents and films.cached
        self._moments: tuple[torch.Tensor, torch.Tensor] | None = None

    def set_trainable(self) -> None:
        self.bundle.unet.requires_grad_(True)
        self.bundle.text_encoder.requires_grad_(self.stage.train_text_encoder)

    @torch.no_grad()
    def _encode(self, indices: Sequence[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior mean and standard deviation of films; once for the whole set when they are cached."""
        if not self.cache_latents:
            posterior = self.bundle.vae.encode(three_channels(self.films.batch(indices)).to(device)).latent_dist
            return posterior.mean, posterior.std
        if self._moments is None:
            total, parts = len(self.films.films), []
            for start in range(0, total, ENCODING_BATCH):
                films = self.films.batch(range(start, min(start + ENCODING_BATCH, total)))
                posterior = self.bundle.vae.encode(three_channels(films).to(device)).latent_dist
                parts.append((posterior.mean.cpu(), posterior.std.cpu()))
            self._moments = torch.cat([mean for mean, _ in parts]), torch.cat([std for _, std in parts])
        mean, std = self._moments
        return mean[list(indices)].to(device), std[list(indices)].to(device)

    def loss(self, network: nn.Module, positions: range, rows: slice, generator: torch.Generator) -> torch.Tensor:
        """Loss of the global batch at ``positions``, restricted to this worker's ``rows``. As in DreamBooth's script,
        instances and class set go through the network in one batch, each with noise and timestep of its own."""
        indices = [self.draws[position] for position in positions]
        device = next(network.parameters()).device
        groups = 2 if self.prior is not None else 1
        chosen = indices[rows]
        if self.prior is not None:
            chosen = chosen + [self.prior[position] for position in positions[rows]]
        mean, std = self._encode(chosen, device)

        count, shape = groups * len(indices), mean.shape[1:]
        mine = torch.cat([torch.arange(count // groups)[rows] + group * len(indices) for group in range(groups)])
        posterior_noise = normal((count, *shape), generator, mean)[mine]
        noise = normal((count, *shape), generator, mean)[mine]
        steps = self.noise_scheduler.config.num_train_timesteps
        timesteps = torch.randint(0, steps, (count,), generator=generator)[mine].to(device)
        dropped = (torch.rand(count, generator=generator) < self.stage.prompt_dropout)[mine]

        latents = (mean + std * posterior_noise) * self.bundle.vae.config.scaling_factor
        noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)
        data = self.bundle.recipe.data
        prompts = [
            "" if drop else data.prompt(self.films.films[index].label)
            for index, drop in zip(chosen, dropped.tolist(), strict=True)
        ]
        distinct = sorted(set(prompts))  # the encoder runs once per distinct prompt of the batch
        ids, mask = text.tokenize(self.bundle.tokenizer, distinct)
        which = torch.tensor([distinct.index(prompt) for prompt in prompts])
        output = network(noisy, timesteps, ids.to(device), mask.to(device), which.to(device))

        prediction_type = self.noise_scheduler.config.prediction_type
        velocity = prediction_type == "v_prediction"
        target = self.noise_scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        weights = None
        if self.stage.snr_gamma is not None:
            alphas = self.noise_scheduler.alphas_cumprod.to(device)
            weights = min_snr_weights(alphas, timesteps, self.stage.snr_gamma, prediction_type)
        return denoising_loss(output, target, weights, len(chosen) // groups, self.stage.prior_loss_weight)

    def finish(self, device: torch.device) -> None:
        pass


class _Denoiser(nn.Module):
    """Both networks behind one forward, so that DDP and gradient accumulation see one module."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        ids: torch.Tensor,
        mask: torch.Tensor,
        which: torch.Tensor,
    ) -> torch.Tensor:
        states = text.embed(self.text_encoder, ids, mask)[which]
        return self.unet(noisy, timesteps, encoder_hidden_states=states).sample


class JudgeStage:
    """The judge of validity, on labels alone. It is kept beside the model and is no part of it."""

    def __init__(self, bundle: Bundle, stage: StageConfig, films: FilmSet, seed: int) -> None:
        self.stage, self.films = stage, films
        self.draws = Draws(films.films, stage.classes, seed)
        self.judge = Judge(sorted(self.draws.members), bundle.recipe.data.healthy_class)
        self.network: nn.Module = self.judge

    def set_trainable(self) -> None:
        self.network.requires_grad_(True)

    def loss(self, network: nn.Module, positions: range, rows: slice, generator: torch.Generator) -> torch.Tensor:
        """Cross-entropy of the global batch at ``positions``, restricted to this worker's ``rows``."""
        sigma = torch.rand(len(positions), generator=generator)[rows]
        noise = torch.rand(len(positions), 1, 1, generator=generator)[rows] * 0.02
        indices = [self.draws[position] for position in positions[rows]]
        films = blur(self.films.batch(indices), sigma)
        films = films + noise * normal((len(positions), *films.shape[1:]), generator, films)[rows]
        target = torch.tensor([self.judge.classes.index(self.films.films[n].label) for n in indices])
        device = next(network.parameters()).device
        return functional.cross_entropy(network(films.to(device)), target.to(device))

    def finish(self, device: torch.device) -> None:
        self.judge.eval()
