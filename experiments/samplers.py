"""Compare samplers: distance to the converged counterfactual, and localization by the map, over UNet forwards.

    make demo && python experiments/samplers.py [--model runs/demo/model] [--images 48]

Method sdedit, from the same noise at the same noise level, on abnormal phantoms of a separate seed. Samplers space
their timesteps differently, so the strength of each row is chosen such that it starts at one of START. The
deterministic samplers solve one differential equation; its solution is computed with REFERENCE steps from the same
start. The reverse SDEs add noise on the way and have no single solution, so only their maps are scored. AUROC uses the
positive part of the compensated map, inside the lungs.
"""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from diffva_ray.counterfactual.attribution import attribution
from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.data.phantoms import Phantom, phantom
from diffva_ray.evaluate.drawing import CLASS_COLOURS, INK, MUTED, RULE, png
from diffva_ray.generate.cost import calls
from diffva_ray.metrics.localization import positive, score
from diffva_ray.metrics.ssim import psnr
from diffva_ray.model.bundle import load
from diffva_ray.model.schedulers import schedule
from diffva_ray.progress import LOG, set_up_logging
from diffva_ray.provenance import code_revision, version

SOLVERS = ("pndm-diffusers", "pndm", "ddim", "dpmsolver++", "unipc", "euler")
SDES = ("vp-sde", "ve-sde")
STEPS = (5, 10, 20, 40, 100)  # over the whole noise schedule; 0.6 of them are executed
REFERENCE = 500
START = {599: "dpmsolver++", 601: "ddim"}  # start timestep, and the sampler that computes the solution from it
GUIDANCE = 3.0
ABNORMAL = ("Lung_Opacity", "COVID", "Viral Pneumonia")
SEED = 501


def strength_of(generate: CounterfactualEngine, scheduler: str, steps: int) -> tuple[float, int]:
    """Return the strength that starts at one of START, and this start."""
    for done in range(1, steps + 1):
        strength = (done + 0.5) / steps
        begins = int(schedule(scheduler, generate.bundle.scheduler, steps, strength)[1][0])
        if begins in START:
            return strength, begins
    raise ValueError(f"{scheduler} with {steps} steps has no timestep among {list(START)}")


def counterfactuals(
    generate: CounterfactualEngine, images: list[Phantom], scheduler: str, steps: int
) -> tuple[NDArray, NDArray]:
    """Return counterfactuals and reconstructions [n, size, size]."""
    settings = generate.settings.replace(
        method="sdedit",
        scheduler=scheduler,
        strength=strength_of(generate, scheduler, steps)[0],
        guidance_scale=GUIDANCE,
        num_inference_steps=steps,
    )
    size, parts = generate.config.micro_batch, []
    for start in range(0, len(images), size):
        some = images[start : start + size]
        seeds = list(range(start, start + len(some)))
        parts.append(generate([image.image for image in some], seeds, settings=settings))
    return np.concatenate([p.counterfactuals for p in parts]), np.concatenate([p.reconstructions for p in parts])


def row_of(
    generate: CounterfactualEngine, images: list[Phantom], scheduler: str, steps: int, converged: dict[int, NDArray]
) -> dict[str, Any]:
    strength, begins = strength_of(generate, scheduler, steps)
    began = time.monotonic()
    found, rebuilt = counterfactuals(generate, images, scheduler, steps)
    seconds = (time.monotonic() - began) / len(images)
    maps = [
        positive(attribution(p.image, r, t, generate.config)) for p, r, t in zip(images, rebuilt, found, strict=True)
    ]
    scored = [score(m, p.lesion, p.lungs) for m, p in zip(maps, images, strict=True)]
    settings = {**generate.config.model_dump(), "method": "sdedit", "scheduler": scheduler, "strength": strength,
                "guidance_scale": GUIDANCE, "num_inference_steps": steps}  # fmt: skip
    return {
        "scheduler": scheduler,
        "steps": steps,
        "unet_calls": calls(settings, len(generate.bundle.recipe.data.prompts)).unet,
        "begins_at": begins,
        "distance": float(np.abs(found - converged[begins]).mean()) if scheduler in SOLVERS else None,
        "auroc": float(np.mean([each.auroc for each in scored if each is not None])),
        "psnr_counterfactual": float(
            np.mean(
                [psnr(counterfactual, image.ground_truth) for counterfactual, image in zip(found, images, strict=True)]
            )
        ),
        "seconds_per_image": seconds,
    }


def picture(rows: list[dict[str, Any]], images: int) -> bytes:
    """Draw two panels over the UNet forwards per image: distance to the converged counterfactual, and AUROC."""
    figure = Figure(figsize=(9.2, 3.7), facecolor="white", layout="constrained")
    panels = figure.subplots(1, 2)
    colours = [*CLASS_COLOURS, "#7f7f7f", "#3b3b3b"]
    for (key, title), axes in zip(
        (
            ("distance", "mean |counterfactual − converged counterfactual|"),
            ("auroc", "AUROC of the map, inside the lungs"),
        ),
        panels,
    ):
        for colour, name in zip(colours, (*SOLVERS, *SDES)):
            line = [(row["unet_calls"], row[key]) for row in rows if row["scheduler"] == name and row[key] is not None]
            if line:
                axes.plot(*zip(*line), color=colour, marker="o", markersize=3.5, linewidth=1.4, label=name,
                          linestyle="--" if name in SDES else "-")  # fmt: skip
        axes.set_xscale("log")
        axes.set_xticks([8, 16, 32, 64, 128], ["8", "16", "32", "64", "128"])
        axes.minorticks_off()
        axes.set_xlabel("UNet forwards an image (a guided step is two)", fontsize=8.5, color=INK)
        axes.set_title(title, fontsize=9.5, color=INK, loc="left")
        axes.tick_params(labelsize=8, colors=MUTED, length=3)
        axes.grid(color=RULE, linewidth=0.5, alpha=0.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0].set_yscale("log")
    panels[1].legend(fontsize=7.5, frameon=False, ncols=2, loc="lower right")
    figure.supxlabel(f"{images} abnormal phantoms, sdedit from timestep 600, guidance {GUIDANCE:g}", fontsize=7.5,
                     color=MUTED)  # fmt: skip
    return png(figure)


@click.command()
@click.option("--model", default="runs/demo/model", show_default=True)
@click.option("--images", "count", default=48, show_default=True, help="Abnormal phantoms.")
@click.option("--result", default="experiments/results/samplers.json", type=click.Path(path_type=Path))
@click.option("--picture", "target", default="docs/images/samplers.png", type=click.Path(path_type=Path))
def main(model: str, count: int, result: Path, target: Path) -> None:
    set_up_logging()
    bundle = load(model)
    changes = {"source_prompt": "", "negative_prompt": "", "difference": "compensated"}
    generate = CounterfactualEngine(bundle, bundle.recipe.generate.model_copy(update=changes), "cpu")
    images = [phantom(ABNORMAL[n % 3], n, SEED, generate.size) for n in range(count)]
    converged = {begins: counterfactuals(generate, images, name, REFERENCE)[0] for begins, name in START.items()}
    rows = []
    for scheduler in (*SOLVERS, *SDES):
        for steps in STEPS:
            rows.append(row_of(generate, images, scheduler, steps, converged))
            LOG.info("%s", rows[-1])
    about = {
        "command": f"python experiments/samplers.py --images {count}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "versions": {key: version(key) for key in ("torch", "diffusers")},
        "code_revision": code_revision(),
        "model_digest": bundle.digest,
        "settings": {"begins_at": list(START), "guidance_scale": GUIDANCE, "reference": f"{REFERENCE} steps"},
        "rows": rows,
    }
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(about, indent=1))
    target.write_bytes(picture(rows, count))


if __name__ == "__main__":
    main()
