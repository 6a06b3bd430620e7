"""What every method works with: a request in latent space, and the guided noise prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler

from diffva_ray.model.schedulers import schedule


@dataclass(frozen=True)
class Edit:
    """A batch of films in latent space and what to make of them. Embeddings are [n, length, width]."""

    latents: torch.Tensor  # float32 [n, 4, h, w], scaled to unit variance
    generators: Sequence[torch.Generator]  # one per film, on the CPU
    prompt: torch.Tensor
    negative: torch.Tensor  # the unconditional branch: "" unless a negative prompt is given
    source: torch.Tensor  # what the film shows, for methods that encode it first
    scheduler: str
    strength: float
    guidance_scale: float
    num_inference_steps: int


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


class Denoiser:
    """The UNet with classifier-free guidance; latents stay float32, the network runs in its own dtype."""

    def __init__(self, unet: Any, scheduler: dict[str, Any]) -> None:
        self.unet = unet
        self.scheduler_config = scheduler
        training = DDPMScheduler.from_config(scheduler)
        self.alphas: torch.Tensor = training.alphas_cumprod
        self.prediction_type: str = training.config.prediction_type

    def schedule(self, edit: Edit) -> tuple[Any, torch.Tensor]:
        """A fresh scheduler and the timesteps that the edit's strength leaves to do."""
        return schedule(edit.scheduler, self.scheduler_config, edit.num_inference_steps, edit.strength)

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """The network's output (noise or velocity) [n, 4, h, w] in float32."""
        dtype = next(self.unet.parameters()).dtype
        return self.unet(latents.to(dtype), timestep, encoder_hidden_states=embedding.to(dtype)).sample.float()

    def guided(self, latents: torch.Tensor, timestep: torch.Tensor, edit: Edit) -> torch.Tensor:
        """Classifier-free guidance (Ho & Salimans 2022), both branches in one batch. As in diffusers, a guidance scale
        of 1 or less switches it off: the prompt alone is used, whatever the number."""
        if edit.guidance_scale <= 1:
            return self.predict(latents, timestep, edit.prompt)
        both = self.predict(torch.cat([latents, latents]), timestep, torch.cat([edit.negative, edit.prompt]))
        negative, prompt = both.chunk(2)
        return negative + edit.guidance_scale * (prompt - negative)

    def denoise(self, latents: torch.Tensor, edit: Edit, scheduler: Any, timesteps: torch.Tensor) -> torch.Tensor:
        """Run the scheduler over ``timesteps`` under guidance."""
        for timestep in timesteps:
            scaled = scheduler.scale_model_input(latents, timestep)  # Euler's latents have the noise's own scale
            latents = scheduler.step(self.guided(scaled, timestep, edit), timestep, latents).prev_sample
        return latents
