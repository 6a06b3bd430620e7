"""Schedulers by name, each with the timesteps to run at a given strength.

``pndm-diffusers`` takes the end of diffusers' list of timesteps, as StableDiffusionImg2ImgPipeline does. PNDM's list
repeats its second entry, because its first PLMS step is a Heun step with two calls. The slice loses this repetition, so
every later call gets a timestep that is one step too low (huggingface/diffusers#9090, #7651). ``pndm`` restores the
repetition in the sliced list.

PNDM mixes network outputs of several timesteps. Mixed velocities (``v_prediction``) are no velocity of any timestep, so
``pndm`` converts each output to noise first, as DPM-Solver and UniPC do; ``pndm-diffusers`` does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from diffva_ray.model.reverse_sde import ReverseSDE, VarianceExploding


def _sliced(timesteps: torch.Tensor, steps: int, strength: float) -> torch.Tensor:
    """StableDiffusionImg2ImgPipeline.get_timesteps: the last int(steps * strength) of ``steps``."""
    return timesteps[max(steps - min(int(steps * strength), steps), 0) :]


def _pndm_diffusers(config: dict[str, Any], steps: int, strength: float) -> tuple[PNDMScheduler, torch.Tensor]:
    """PNDM as in diffusers' pipeline."""
    scheduler = PNDMScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    return scheduler, _sliced(scheduler.timesteps, steps, strength)


class _NoisePNDM(PNDMScheduler):
    """PNDM that mixes noise, also for a network that predicts velocity."""

    predicts_velocity = False  # whether the network does

    def step(self, output: torch.Tensor, timestep: Any, sample: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        """One step; ``output`` is the network's for ``sample`` at ``timestep``."""
        if self.predicts_velocity:
            alpha = cast("Any", self).alphas_cumprod[int(timestep)]
            output = alpha.sqrt() * output + (1 - alpha).sqrt() * sample
        return PNDMScheduler.step(cast("Any", self), output, timestep, sample, *arguments, **options)


def _pndm(config: dict[str, Any], steps: int, strength: float) -> tuple[PNDMScheduler, torch.Tensor]:
    """PNDM whose second timestep is repeated, as its first step needs it."""
    kind: Any = _NoisePNDM  # diffusers has no types
    scheduler = kind.from_config({**config, "skip_prk_steps": True, "prediction_type": "epsilon"})
    scheduler.predicts_velocity = config.get("prediction_type") == "v_prediction"
    scheduler.set_timesteps(steps)
    once = scheduler.timesteps.unique().flip(0)
    tail = _sliced(once, steps, strength)
    return scheduler, torch.cat([tail[:2], tail[1:]])


def _ddim(kind: type[DDIMScheduler]) -> Callable[[dict[str, Any], int, float], tuple[DDIMScheduler, torch.Tensor]]:
    """A scheduler with DDIM's timesteps; it keeps no state between steps."""

    def make(config: dict[str, Any], steps: int, strength: float) -> tuple[DDIMScheduler, torch.Tensor]:
        scheduler = kind.from_config({**config, "clip_sample": False})
        scheduler.set_timesteps(steps)
        return scheduler, _sliced(scheduler.timesteps, steps, strength)

    return make


def _multistep(kind: Any, **changes: Any) -> Callable[[dict[str, Any], int, float], tuple[Any, torch.Tensor]]:
    """A diffusers solver that counts its steps; ``set_begin_index`` tells the solver where the strength begins."""

    def make(config: dict[str, Any], steps: int, strength: float) -> tuple[Any, torch.Tensor]:
        scheduler = kind.from_config({**config, **changes})
        scheduler.set_timesteps(steps)
        timesteps = _sliced(scheduler.timesteps, steps, strength)
        scheduler.set_begin_index(len(scheduler.timesteps) - len(timesteps))
        return scheduler, timesteps

    return make


class _UniPC(UniPCMultistepScheduler):
    """UniPC of second order (Zhao et al. 2023, B(h) = e^h - 1), equal to diffusers' class to the last bit.

    diffusers computes the coefficients on the samples' device, where every step copies noise levels and solves a system
    of two equations, for which the CPU waits. Here the coefficients stay on the CPU.
    """

    sigmas: torch.Tensor
    step_index: int
    model_outputs: list[torch.Tensor]  # predicted clean samples, the newest last

    def multistep_uni_p_bh_update(self, model_output: Any, *_: Any, sample: torch.Tensor, order: int) -> torch.Tensor:
        """Predict the sample of the next timestep."""
        m0 = self.model_outputs[-1]
        x_t, scale, h, start = self._first_order(sample, m0, self.step_index, self.step_index + 1)
        if order == 1:
            return x_t
        rk = (self._half_log_snr(self.step_index - 1) - start) / h
        return x_t - scale * (0.5 * ((self.model_outputs[-2] - m0) / rk))

    def multistep_uni_c_bh_update(
        self,
        this_model_output: torch.Tensor,
        *_: Any,
        last_sample: torch.Tensor,
        this_sample: torch.Tensor,
        order: int,
    ) -> torch.Tensor:
        """Correct the sample of this timestep by the network's output for it."""
        m0 = self.model_outputs[-1]
        x_t, scale, h, start = self._first_order(last_sample, m0, self.step_index - 1, self.step_index)
        newest = this_model_output - m0
        if order == 1:
            return x_t - scale * (0.5 * newest)
        rk = (self._half_log_snr(self.step_index - 2) - start) / h
        rks, phi_1 = torch.stack([rk, torch.ones(())]), torch.expm1(-h)
        phi_2 = phi_1 / -h - 1
        b = torch.stack([phi_2 / phi_1, (phi_2 / -h - 1 / 2) * 2 / phi_1])
        rhos: torch.Tensor = torch.linalg.solve(torch.stack([rks**0, rks]), b)
        return x_t - scale * (rhos[0] * ((self.model_outputs[-2] - m0) / rk) + rhos[1] * newest)

    def _first_order(
        self, x: torch.Tensor, m0: torch.Tensor, start: int, end: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The solution of first order at index ``end``, the factor of the higher orders, the step in half log SNR, and
        half the log SNR at ``start``."""
        convert = cast(
            "Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]", cast("Any", self)._sigma_to_alpha_sigma_t
        )
        (alpha_t, sigma_t), (_, sigma_start) = convert(self.sigmas[end]), convert(self.sigmas[start])
        h = self._half_log_snr(end) - self._half_log_snr(start)
        phi_1 = torch.expm1(-h)
        x_t: torch.Tensor = sigma_t / sigma_start * x - alpha_t * phi_1 * m0
        return x_t, alpha_t * phi_1, h, self._half_log_snr(start)

    def _half_log_snr(self, index: int) -> torch.Tensor:
        alpha, sigma = cast("Any", self)._sigma_to_alpha_sigma_t(self.sigmas[index])
        half: torch.Tensor = torch.log(alpha) - torch.log(sigma)
        return half


# With Stable Diffusion's spacing "leading", these two solvers step by 1000 // (N + 1): 100 steps cover 0.9 of the noise
# schedule and 500 steps half of it, so the noise level of a strength would depend on N.
SPACING = {"timestep_spacing": "trailing"}  # Lin et al. 2023, table 2

SCHEDULERS: dict[str, Callable[[dict[str, Any], int, float], tuple[Any, torch.Tensor]]] = {
    "pndm": _pndm,
    "pndm-diffusers": _pndm_diffusers,
    "ddim": _ddim(DDIMScheduler),
    "vp-sde": _ddim(ReverseSDE),
    "ve-sde": _ddim(VarianceExploding),
    "dpmsolver++": _multistep(DPMSolverMultistepScheduler, **SPACING),  # 2M (Lu et al. 2022)
    "unipc": _multistep(_UniPC, **SPACING),  # Zhao et al. 2023
    "euler": _multistep(EulerDiscreteScheduler),  # Karras et al. 2022, algorithm 2 without churn
}


def schedule(name: str, config: dict[str, Any], steps: int, strength: float) -> tuple[Any, torch.Tensor]:
    """A new scheduler and the timesteps [n] to run, in order of decreasing noise.

    Raises ValueError for an unknown name, and when ``int(steps * strength)`` is 0, which leaves no step.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {name!r}; there are {', '.join(SCHEDULERS)}")
    if int(steps * strength) < 1:
        raise ValueError(f"strength {strength:g} of {steps} steps leaves no step to run; increase one of them")
    return SCHEDULERS[name](config, steps, strength)
