"""Estimates the cost of a run before it starts: network calls per record, and operations of known networks.

Calls are exact. Operations are those of one forward pass, as torch's FlopCounterMode counts them, times the calls.
Hours come from a measured pace: of the run's own shards, of a probe, or given by the user.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from diffva_ray.config.generation import AccelerationConfig
from diffva_ray.config.methods import METHODS, Calls
from diffva_ray.config.prompts import parts
from diffva_ray.config.recipe import GUESS, Recipe

GUESS_CALLS = 8  # per prompt: DRAWS * len(TIMESTEPS) of counterfactual/guess.py, which loads torch
MASK_CALLS = 6  # of DiffEdit's mask: CALLS of counterfactual/guidance_difference.py
# TFLOP of one forward pass (a multiplication and an addition are two operations) of UNet, encoder, decoder and
# ControlNet, by base model and resolution
TFLOP = {("CompVis/stable-diffusion-v1-4", 512): (0.803, 1.117, 2.515, 0.283)}


def calls(settings: Mapping[str, Any], prompts: int, controlnets: int = 1) -> Calls:
    """Network calls of one record. ``settings``: as in ``GenerateConfig``, and the ``prompt`` where it is composed;
    ``prompts`` and ``controlnets``: numbers of the model's prompts and ControlNets.

    UNet calls that compute only its outermost layers (``deep_features_every``) count as whole calls.
    """
    steps = int(settings["num_inference_steps"] * settings["strength"])
    if settings["scheduler"] == "pndm-diffusers" or (settings["scheduler"] == "pndm" and steps > 1):
        steps += 1  # the first PNDM step makes two calls
    shortcuts = AccelerationConfig.model_validate(settings["acceleration"])
    guided = sum(shortcuts.guides(step, steps) for step in range(steps)) if settings["guidance_scale"] > 1 else 0
    of_method = METHODS[settings["method"]].calls(steps, guided)
    further = guided * (len(parts(settings.get("prompt", ""))) - 1)  # of a composed prompt
    guessed = GUESS_CALLS * prompts if settings["source_prompt"] == GUESS else 0
    derived = settings["method"] == "masked" and settings["masked"]["source"] == "derived"
    scale = settings["controlnet"]["conditioning_scale"]
    used = sum(weight > 0 for weight in (scale if isinstance(scale, (list, tuple)) else [scale] * controlnets))
    unet = of_method.unet + further + guessed + (MASK_CALLS if derived else 0)
    return of_method._replace(unet=unet, controlnet=of_method.controlnet * used)


class Pace(NamedTuple):
    """The measured speed of one actor."""

    seconds: float  # per record
    stored: float | None  # bytes stored per record; None: not measured
    device: str  # cuda, cpu


def estimate(pace: Pace, records: int, actors: int | None, gpus_per_actor: float | None) -> dict[str, Any]:
    """Device hours, hours with ``actors`` actors in parallel, and gigabytes of ``records`` records.

    ``gpus_per_actor``: None for one whole GPU per actor."""
    share = 1.0 if gpus_per_actor is None or pace.device == "cpu" else gpus_per_actor
    hours = pace.seconds * records / 3600
    result: dict[str, Any] = {f"estimated_{'gpu' if pace.device == 'cuda' else 'cpu'}_hours": hours * share}
    if actors is not None:
        result |= {"actors": actors, "estimated_hours": hours / actors}
    if pace.stored is not None:
        result["estimated_gigabytes"] = pace.stored * records / 1e9
    return result


def cost(
    recipe: Recipe, sweep: Sequence[tuple[str, Sequence[Any]]], records: int, prompt: str | None = None
) -> dict[str, Any]:
    """The cost of ``records`` records under a prompt, spread evenly over the points of a sweep.

    UNet forward passes and TFLOP, per record on average and in total, and an upper limit of the stored bytes: one per
    pixel of counterfactual and reconstruction, two per pixel of the map, 4 kB of row, features and headers. TFLOP are
    None for networks that are not in the table and with ``deep_features_every``. Raises ValueError for invalid
    acceleration settings."""
    of_points = []
    controlnets = sum(stage.trains == "controlnet" for stage in recipe.train.stages) or 1
    for values in itertools.product(*(values for _, values in sweep)):
        swept = dict(zip((key for key, _ in sweep), values, strict=True))
        settings = {**recipe.generate.model_dump(), "prompt": prompt or "", **swept}
        of_points.append(calls(settings, len(recipe.data.prompts), controlnets))
    networks = TFLOP.get((recipe.model.base or "", recipe.model.resolution))
    unet = sum(point.unet for point in of_points) / len(of_points)
    tflop = None
    if networks is not None and recipe.generate.acceleration.deep_features_every == 1:
        tflop = sum(n * size for point in of_points for n, size in zip(point, networks, strict=True)) / len(of_points)
    return {
        "unet_forwards_per_record": round(unet, 1),
        "unet_forwards": round(unet * records),
        "tflop_per_record": None if tflop is None else round(tflop, 1),
        "tflop": None if tflop is None else round(tflop * records),
        "gigabytes_at_most": float(f"{(4 * recipe.model.resolution**2 + 4096) * records / 1e9:.4g}"),
    }
