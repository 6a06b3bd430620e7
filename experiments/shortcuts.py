"""Measure training-free shortcuts: CPU seconds saved, distance of the maps, and localization.

    make demo && python experiments/shortcuts.py [--model runs/demo/model] [--images 96]

Uses the recipe's own method on abnormal phantoms of a separate seed, with one shortcut at a time. Distance is the mean
|map - map without shortcuts| over the mean |map|. AUROC uses the positive part inside the lungs. Seconds are CPU
seconds of one core for generation alone, as a share of the plain method's in the same round (interleaved rounds;
median).
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from diffva_ray.config.generation import AccelerationConfig
from diffva_ray.config.recipe import GenerateConfig
from diffva_ray.counterfactual.attribution import attribution
from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.data.phantoms import Phantom, phantom
from diffva_ray.generate.cost import calls
from diffva_ray.metrics.localization import positive, score
from diffva_ray.metrics.ssim import psnr
from diffva_ray.model.bundle import load
from diffva_ray.progress import LOG, set_up_logging
from diffva_ray.provenance import code_revision, version

ABNORMAL = ("Lung_Opacity", "COVID", "Viral Pneumonia")
SEED = 502
SHORTCUTS: dict[str, dict[str, Any]] = {
    "none": {},
    "12 steps instead of 20": {"num_inference_steps": 12},
    "6 steps": {"num_inference_steps": 6},
    "guidance in the first half": {"guidance_end": 0.5},
    "guidance in the second half": {"guidance_start": 0.5},
    "deep features every 2nd step": {"deep_features_every": 2},
    "deep features every 3rd step": {"deep_features_every": 3},
    "source prompt not guessed": {"source_prompt": "", "negative_prompt": ""},
}


def changed(config: GenerateConfig, shortcut: dict[str, Any]) -> GenerateConfig:
    ours = {key: value for key, value in shortcut.items() if key in AccelerationConfig.model_fields}
    plain = {key: value for key, value in shortcut.items() if key not in ours}
    return config.model_copy(update={**plain, "acceleration": AccelerationConfig(**ours)})


def generate(engine: CounterfactualEngine, images: list[Phantom]) -> tuple[list[NDArray], list[NDArray], float]:
    """Return a CounterfactualBatch, attribution maps, and CPU seconds per image."""
    counterfactuals: list[NDArray] = []
    maps: list[NDArray] = []
    size, spent = engine.config.micro_batch, 0.0
    for start in range(0, len(images), size):
        some = images[start : start + size]
        began = time.process_time()
        made = engine([image.image for image in some], list(range(start, start + len(some))))
        spent += time.process_time() - began
        for image, counterfactual, rebuilt in zip(some, made.counterfactuals, made.reconstructions, strict=True):
            counterfactuals.append(counterfactual)
            maps.append(attribution(image.image, rebuilt, counterfactual, engine.config))
    return counterfactuals, maps, spent / len(images)


@click.command()
@click.option("--model", default="runs/demo/model", show_default=True)
@click.option("--images", "count", default=96, show_default=True, help="Abnormal phantoms.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--result", default="experiments/results/shortcuts.json", type=click.Path(path_type=Path))
def main(model: str, count: int, rounds: int, result: Path) -> None:
    set_up_logging()
    bundle = load(model)
    base = bundle.recipe.generate
    images = [phantom(ABNORMAL[n % 3], n, SEED, bundle.recipe.model.resolution) for n in range(count)]
    engines = {
        name: CounterfactualEngine(bundle, changed(base, shortcut), "cpu") for name, shortcut in SHORTCUTS.items()
    }
    made: dict[str, tuple[list[NDArray], list[NDArray]]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in SHORTCUTS}
    for turn in range(rounds):
        for name in list(SHORTCUTS)[:: 1 if turn % 2 == 0 else -1]:
            counterfactuals, maps, spent = generate(engines[name], images)
            made[name] = counterfactuals, maps
            seconds[name].append(spent)
    plain = made["none"][1]
    rows = []
    for name in SHORTCUTS:
        counterfactuals, maps = made[name]
        found = [score(positive(m), image.lesion, image.lungs) for m, image in zip(maps, images, strict=True)]
        apart = np.mean([np.abs(a - b).mean() for a, b in zip(maps, plain, strict=True)])
        rows.append(
            {
                "shortcut": name,
                "unet_calls": calls(engines[name].config.model_dump(), len(bundle.recipe.data.prompts)).unet,
                "cpu_seconds_share": statistics.median(
                    a / b for a, b in zip(seconds[name], seconds["none"], strict=True)
                ),
                "cpu_seconds_a_image": statistics.median(seconds[name]),
                "map_distance": float(apart / np.mean([np.abs(m).mean() for m in plain])),
                "auroc": float(np.mean([each.auroc for each in found if each is not None])),
                "psnr_counterfactual": float(
                    np.mean(
                        [
                            psnr(counterfactual, image.ground_truth)
                            for counterfactual, image in zip(counterfactuals, images, strict=True)
                        ]
                    )
                ),
            }
        )
        LOG.info("%s", rows[-1])
    about = {
        "command": f"python experiments/shortcuts.py --model {model} --images {count} --rounds {rounds}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "versions": {key: version(key) for key in ("torch", "diffusers")},
        "code_revision": code_revision(),
        "model_digest": bundle.digest,
        "method": {key: getattr(base, key) for key in ("method", "strength", "guidance_scale", "num_inference_steps")},
        "rows": rows,
    }
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
