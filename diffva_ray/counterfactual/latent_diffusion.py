"""What every method works with: a request, and the latent diffusion model with its guided noise prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler

from diffva_ray.config import GenerateConfig
from diffva_ray.model.bundle import Bundle
from diffva_ray.model.reverse_sde import ReverseSDE
from diffva_ray.model.schedulers import schedule


@dataclass(frozen=True)
class Edit:
    """A batch of films and what to make of them. Embeddings are [n, length, width]; everything is on the device."""

    films: torch.Tensor  # grey float32 [n, size, size] in [0, 1]
    lungs: torch.Tensor  # bool [n, size, size]; all true for a film without a mask
    latents: torch.Tensor  # float32 [n, 4, h, w], scaled to unit variance
    generators: Sequence[torch.Generator]  # one per film, on the CPU
    prompt: torch.Tensor
    negative: torch.Tensor  # the unconditional branch: "" unless a negative prompt is given
    source: torch.Tensor  # what the film shows, for methods that encode it first
    scheduler: str
    strength: float
    guidance_scale: float
    num_inference_steps: int
    config: GenerateConfig  # the rest: what one method alone understands


@dataclass(frozen=True)
class Healed:
    """Grey films [n, size, size] in [0, 1]: the twins, and what the method would have returned had it changed nothing
    (D(E(film)) where it goes through the autoencoder): the compensated map is the difference of the two."""

    counterfactuals: torch.Tensor
    reconstructions: torch.Tensor


def noise(shape: torch.Size, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Standard normal [n, ...], row i from generator i, drawn on the CPU so that it is the same for every device."""
    return torch.cat([torch.randn((1, *shape[1:]), generator=generator) for generator in generators])


def split(
    output: torch.Tensor, latents: torch.Tensor, alpha: torch.Tensor, prediction_type: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The clean latents and the noise that a prediction (``epsilon`` or ``v_prediction``) sees in noisy ones."""
    signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
    if prediction_type == "v_prediction":
        return signal * latents - sigma * output, signal * output + sigma * latents
    return (latents - sigma * output) / signal, output


class LatentDiffusion:
    """Autoencoder and UNet with classifier-free guidance; latents stay float32, networks run in their own dtype."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.vae, self.unet = bundle, bundle.vae, bundle.unet
        self.scale: float = bundle.vae.config.scaling_factor
        training = DDPMScheduler.from_config(bundle.scheduler)
        self.alphas: torch.Tensor = training.alphas_cumprod
        self.prediction_type: str = training.config.prediction_type

    def encode(self, films: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior mean and standard deviation, unscaled, of grey films [n, size, size] in [0, 1]."""
        pixels = films.to(next(self.vae.parameters()).dtype)[:, None].expand(-1, 3, -1, -1) * 2 - 1
        posterior = self.vae.encode(pixels.contiguous()).latent_dist
        return posterior.mean, posterior.std

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Grey films [n, size, size] in [0, 1] of latents of unit variance: the mean of the three channels, each
        clamped first as in diffusers."""
        colours = self.vae.decode((latents / self.scale).to(next(self.vae.parameters()).dtype)).sample.float() / 2 + 0.5
        return colours.clamp(0, 1).mean(dim=1)

    def healed(self, latents: torch.Tensor, request: Edit) -> Healed:
        """The end of a method that edits in latent space alone."""
        return Healed(self.decode(latents), self.decode(request.latents))

    def schedule(self, request: Edit) -> tuple[Any, torch.Tensor]:
        """A fresh scheduler and the timesteps that the edit's strength leaves to do."""
        return schedule(request.scheduler, self.bundle.scheduler, request.num_inference_steps, request.strength)

    def predict(
        self, latents: torch.Tensor, timestep: torch.Tensor, embedding: torch.Tensor, **residuals: Any
    ) -> torch.Tensor:
        """The network's output (noise or velocity) [n, 4, h, w] in float32. ``residuals``: a ControlNet's."""
        dtype = next(self.unet.parameters()).dtype
        states = embedding.to(dtype)
        return self.unet(latents.to(dtype), timestep, encoder_hidden_states=states, **residuals).sample.float()

    def guided(self, latents: torch.Tensor, timestep: torch.Tensor, request: Edit, **residuals: Any) -> torch.Tensor:
        """Classifier-free guidance (Ho & Salimans 2022), both branches in one batch. As in diffusers, a guidance scale
        of 1 or less switches it off: the prompt alone is used, whatever the number."""
        if request.guidance_scale <= 1:
            return self.predict(latents, timestep, request.prompt, **residuals)
        embedding = torch.cat([request.negative, request.prompt])
        negative, prompt = self.predict(torch.cat([latents, latents]), timestep, embedding, **residuals).chunk(2)
        return negative + request.guidance_scale * (prompt - negative)

    def denoise(self, latents: torch.Tensor, request: Edit, scheduler: Any, timesteps: torch.Tensor) -> torch.Tensor:
        """Run the scheduler over ``timesteps`` under guidance."""
        for timestep in timesteps:
            scaled = scheduler.scale_model_input(latents, timestep)  # Euler's latents have the noise's own scale
            latents = self.step(self.guided(scaled, timestep, request), timestep, latents, request, scheduler)
        return latents

    def step(
        self, output: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor, request: Edit, scheduler: Any
    ) -> torch.Tensor:
        """The scheduler's own step; what noise it adds comes from each film's own generator."""
        noisy = {"generator": list(request.generators)} if isinstance(scheduler, ReverseSDE) else {}
        return scheduler.step(output, timestep, latents, **noisy).prev_sample
