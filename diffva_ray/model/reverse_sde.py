"""Samplers that solve the reverse SDE by Euler-Maruyama, variance preserving and variance exploding (Song et al. 2021;
the paper's equations 4 to 6), on the noise levels of the model's schedule."""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor


class ReverseSDE(DDIMScheduler):
    """Variance preserving SDE on DDIM's timesteps. Each step but the last adds noise; the last returns the mean."""

    # types of attributes that diffusers' decorators set
    config: Any
    alphas_cumprod: torch.Tensor
    final_alpha_cumprod: torch.Tensor
    num_inference_steps: int
    exploding = False  # whether ``step`` uses the variance exploding form
    _noises: dict[int, torch.Tensor]  # noise of the coming steps by timestep, on the samples' device

    def set_timesteps(self, *arguments: Any, **options: Any) -> None:
        """As in DDIM; forgets the noise that was drawn for another path."""
        self._noises = {}
        cast("Any", super()).set_timesteps(*arguments, **options)  # diffusers has no types

    def _noise(self, timestep: int, stride: int, sample: torch.Tensor, generator: Any) -> torch.Tensor:
        """Noise of this step. The first step draws the noise of all steps on the CPU, and copies it in one piece, so
        that the later ones do not wait for a copy."""
        if timestep not in self._noises:
            steps = range(timestep, stride - 1, -stride)
            drawn = [randn_tensor(sample.shape, generator=generator, dtype=sample.dtype) for _ in steps]
            self._noises = dict(zip(steps, torch.stack(drawn).to(sample.device).unbind(), strict=True))
        return self._noises.pop(timestep)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        *_: Any,
        generator: Any = None,
        **__: Any,
    ) -> DDIMSchedulerOutput:
        """Latents [n, 4, h, w] at the next timestep; ``generator``: one for all rows, or a list with one for each.

        With a(t) the schedule's ``alphas_cumprod`` and the score -eps / sqrt(1 - a): variance preserving is
        dx = -b/2 x dt + sqrt(b) dw, where the integral of b over a step is log a(t-1)/a(t); variance exploding is the
        same process in y = x / sqrt(a), dy = sqrt(d sigma^2) dw with sigma^2 = (1 - a) / a. The two discretisations
        differ for few steps and converge for many.
        """
        # noise levels of both timesteps, and the noise prediction
        stride = self.config.num_train_timesteps // self.num_inference_steps
        before = int(timestep) - stride
        alpha = self.alphas_cumprod[int(timestep)]
        alpha_before = self.alphas_cumprod[before] if before >= 0 else self.final_alpha_cumprod
        if self.config.prediction_type == "v_prediction":
            model_output = alpha.sqrt() * model_output + (1 - alpha).sqrt() * sample
        # noise of this step
        last = before < 0
        noise = torch.zeros_like(sample) if last else self._noise(int(timestep), stride, sample, generator)
        # one Euler-Maruyama step
        if self.exploding:
            sigma = ((1 - alpha) / alpha).sqrt()
            step = sigma**2 - (1 - alpha_before) / alpha_before
            scaled = sample / alpha.sqrt() - step / sigma * model_output + step.sqrt() * noise
            return DDIMSchedulerOutput(prev_sample=alpha_before.sqrt() * scaled)
        step = (alpha_before / alpha).log()
        drift = sample / 2 - model_output / (1 - alpha).sqrt()
        return DDIMSchedulerOutput(prev_sample=sample + step * drift + step.sqrt() * noise)


class VarianceExploding(ReverseSDE):
    """Variance exploding SDE; see ``ReverseSDE.step``."""

    exploding = True
