"""What a run costs, known before it is begun: network calls a record, and operations where the networks are known.

Calls are exact. Operations are those of one forward, as torch's FlopCounterMode counts them, times the calls. Hours
come from a pace that somebody has measured: the run's own shards, a probe, or the user.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from diffva_ray.config.generation import AccelerationConfig
from diffva_ray.config.methods import METHODS, Calls
from diffva_ray.config.recipe import GUESS, Recipe

GUESS_CALLS = 8  # a prompt: DRAWS * len(TIMESTEPS) of counterfactual/guess.py, which loads torch
MASK_CALLS = 6  # of DiffEdit's mask: CALLS of counterfactual/guidance_difference.py


# TFLOP of one forward (a multiplication and an addition are two), by base and resolution: UNet, encoder, decoder,
# ControlNet.
TFLOP = {("CompVis/stable-diffusion-v1-4", 512): (0.803, 1.117, 2.515, 0.283)}


def calls(settings: Mapping[str, Any], prompts: int) -> Calls:
    """Network calls of one record with these settings (as in ``GenerateConfig``) and a model of so many ``prompts``.

    Calls that only the outermost layers of the UNet answer (``deep_features_every``) count like all others.
    """
    steps = int(settings["num_inference_steps"] * settings["strength"])
    if settings["scheduler"] == "pndm-diffusers" or (settings["scheduler"] == "pndm" and steps > 1):
        steps += 1  # its first step is two calls
    shortcuts = AccelerationConfig.model_validate(settings["acceleration"])
    guided = sum(shortcuts.guides(step, steps) for step in range(steps)) if settings["guidance_scale"] > 1 else 0
    found = METHODS[settings["method"]].calls(steps, guided)
    guessed = GUESS_CALLS * prompts if settings["source_prompt"] == GUESS else 0
    derived = settings["method"] == "masked" and settings["masked"]["source"] == "derived"
    return found._replace(unet=found.unet + guessed + (MASK_CALLS if derived else 0))


class Pace(NamedTuple):
    """Of one actor: seconds a record, bytes it stores a record (None: not measured), and the device that has them."""

    seconds: float
    stored: float | None
    device: str  # cuda, cpu


def estimate(pace: Pace, records: int, actors: int | None, gpus_per_actor: float | None) -> dict[str, Any]:
    """Device hours, hours of so many actors side by side, and gigabytes, of ``records`` records. An actor has a GPU to
    itself unless ``gpus_per_actor`` says otherwise."""
    share = 1.0 if gpus_per_actor is None or pace.device == "cpu" else gpus_per_actor
    hours = pace.seconds * records / 3600
    found: dict[str, Any] = {f"estimated_{'gpu' if pace.device == 'cuda' else 'cpu'}_hours": hours * share}
    if actors is not None:
        found |= {"actors": actors, "estimated_hours": hours / actors}
    if pace.stored is not None:
        found["estimated_gigabytes"] = pace.stored * records / 1e9
    return found


def cost(recipe: Recipe, sweep: Sequence[tuple[str, Sequence[Any]]], records: int) -> dict[str, Any]:
    """The cost of ``records`` records, spread evenly over the points of a sweep: UNet forwards and TFLOP (None:
    networks that are not in the table, or work in part), of a record on average and of all; and what they store at
    most: counterfactual and reconstruction (a byte a pixel), map (two), 4 kB of row, features and headers. Raises
    ValueError as ``calls``."""
    of_points = []
    for point in itertools.product(*(values for _, values in sweep)):
        swept = dict(zip((key for key, _ in sweep), point, strict=True))
        of_points.append(calls({**recipe.generate.model_dump(), **swept}, len(recipe.data.prompts)))
    networks = TFLOP.get((recipe.model.base or "", recipe.model.resolution))
    unet = sum(each.unet for each in of_points) / len(of_points)
    tflop = None
    if networks is not None and recipe.generate.acceleration.deep_features_every == 1:
        tflop = sum(n * size for each in of_points for n, size in zip(each, networks, strict=True)) / len(of_points)
    return {
        "unet_forwards_per_record": round(unet, 1),
        "unet_forwards": round(unet * records),
        "tflop_per_record": None if tflop is None else round(tflop, 1),
        "tflop": None if tflop is None else round(tflop * records),
        "gigabytes_at_most": float(f"{(4 * recipe.model.resolution**2 + 4096) * records / 1e9:.4g}"),
    }
