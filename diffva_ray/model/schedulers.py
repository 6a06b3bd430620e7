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
            alpha = cast("Any", self).alphas_cumprod.to(sample)[int(timestep)]
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
    "unipc": _multistep(UniPCMultistepScheduler, **SPACING),  # Zhao et al. 2023
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
