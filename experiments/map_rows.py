"""Rows of related_work.py that make a map without a counterfactual: they read our model and edit nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cross_attention import TIMESTEPS, cross_attention_maps
from numpy.typing import NDArray
from torch.nn import functional

from diffva_ray.counterfactual import guidance_difference
from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.evaluate.records import as_records, read_images, read_records, read_truth
from diffva_ray.evaluate.scores import score_image
from diffva_ray.generate.run import open_run
from diffva_ray.metrics.localization import smooth

Maps = NDArray[np.float32]
SMOOTHING = (0.0, 0.02, 0.04, 0.08)  # candidates: standard deviation of the Gaussian, as a share of the width
BATCH = 16


def cross_attention_rows(engine: CounterfactualEngine, images: Sequence[Maps], labels: Sequence[str]) -> Maps:
    """Attention to the words of each image's own class (Tang et al. 2023; Vilouras et al. 2024)."""
    prompts = [engine.bundle.recipe.data.prompt(label) for label in labels]
    return cross_attention_maps(engine, images, prompts, list(range(len(images))))


@torch.inference_mode()
def guidance_rows(engine: CounterfactualEngine, images: Sequence[Maps], labels: Sequence[str]) -> Maps:
    """Difference of the noise predicted for healthy and for each image's own class (Couairon et al. 2023)."""
    data, maps = engine.bundle.recipe.data, []
    for start in range(0, len(images), BATCH):
        part, names = images[start : start + BATCH], labels[start : start + BATCH]
        squares = torch.from_numpy(np.stack(part)).to(engine.device)
        latents = engine.model.encode(squares)[0].float() * engine.model.scale
        grids = guidance_difference.guidance_difference(
            engine.model, latents, engine.embed(data.healthy_prompt).expand(len(part), -1, -1),
            torch.cat([engine.embed(data.prompt(name)) for name in names]),
            [torch.Generator("cpu").manual_seed(start + n) for n in range(len(part))],
        )  # fmt: skip
        grids = functional.interpolate(grids[:, None], size=(engine.size,) * 2, mode="bilinear")[:, 0]
        maps.append(grids.cpu().numpy())
    return np.concatenate(maps)


MAP_ROWS: dict[str, Callable[[CounterfactualEngine, Sequence[Maps], Sequence[str]], Maps]] = {
    "cross-attention": cross_attention_rows,
    "guidance-difference": guidance_rows,
}
CALLS = {"cross-attention": len(TIMESTEPS), "guidance-difference": guidance_difference.CALLS}  # of the UNet


def scored(name: str, model: Path, out: Path, widths: Sequence[float]) -> tuple[dict[float, dict[str, Any]], float]:
    """Scores of each image of a finished run by path, for each smoothing width, and the core seconds of a map."""
    engine, run = CounterfactualEngine.from_pretrained(str(model), "cpu"), open_run(str(out))
    rows = as_records(read_records(run))
    images, truths = [read_images(run, row).image for row in rows], [read_truth(run, row, {}) for row in rows]
    begun = time.process_time()
    maps = MAP_ROWS[name](engine, images, [row["label"] for row in rows])
    seconds = (time.process_time() - begun) / len(rows)
    found: dict[float, dict[str, Any]] = {width: {} for width in widths}
    for row, saliency, truth in zip(rows, maps, truths, strict=True):
        for width in widths:
            for scores in score_image({name: smooth(saliency, width)}, truth):
                found[width][row["image_path"]] = scores
    return found, seconds
