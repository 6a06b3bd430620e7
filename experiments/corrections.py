"""Measure what each correction of the paper's recipe brings, on the demo's model and images.

    make demo && python experiments/corrections.py

Every row changes one thing from the row above it. Thresholds are fixed on the validation images. Scores use the test
images and the positive part of each row's map, inside the lungs; trivial baselines follow at the end.
"""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path

import click
import pandas as pd

from diffva_ray.config.recipe import make_recipe
from diffva_ray.distributed import session
from diffva_ray.evaluate.reduction import Options
from diffva_ray.generate.cost import calls
from diffva_ray.generate.plan import Request
from diffva_ray.generate.run import open_run
from diffva_ray.metrics.baselines import BASELINES
from diffva_ray.model.card import read_card
from diffva_ray.progress import set_up_logging
from diffva_ray.provenance import code_revision, version
from diffva_ray.storage.opening import open_store
from diffva_ray.workflows.generate import generate_run
from diffva_ray.workflows.reduce import reduce

PAPER = {
    "method": "sdedit", "scheduler": "pndm-diffusers", "strength": 0.55, "guidance_scale": 4.0,
    "num_inference_steps": 75, "posterior": "sample", "difference": "raw", "smoothing": 0.0,
    "source_prompt": "", "negative_prompt": "",
}  # fmt: skip
STEPS: list[tuple[str, dict[str, object]]] = [
    ("the paper's settings (0.55 / 4 / PNDM 75, raw map)", {}),
    ("+ PNDM aligned, posterior mean", {"scheduler": "pndm", "posterior": "mode"}),
    ("+ map against the autoencoder's image", {"difference": "compensated"}),
    ("+ map smoothed", {"smoothing": 0.024}),
    ("+ DDIM, 20 steps", {"scheduler": "ddim", "num_inference_steps": 20}),
    (
        "+ DDIM inversion instead of noise, 0.6 / 2.5",
        {"method": "ddim-inversion", "strength": 0.6, "guidance_scale": 2.5},
    ),
    ("+ source prompt guessed by the model", {"source_prompt": "<guess>"}),
    ("+ guided away from it (recipe phantom)", {"negative_prompt": "<source>"}),
]


def of(metrics: dict, table: str, **match: object) -> dict:
    rows = [row for row in metrics.get(table, []) if all(row[key] == value for key, value in match.items())]
    return rows[0] if rows else {}


@click.command()
@click.option("--demo", default="runs/demo", show_default=True, help="A finished `diffva demo`.")
@click.option("--result", default="experiments/results/corrections.json", type=click.Path(path_type=Path))
def main(demo: str, result: Path) -> None:
    set_up_logging()
    card = read_card(open_store(f"{demo}/model"))
    if card is None:
        raise click.ClickException(f"{demo}: no model there; run make demo first")
    settings, table, metrics = dict(PAPER), [], {}
    with session.connect():
        for turn, (name, change) in enumerate(STEPS):
            settings |= change
            recipe = make_recipe({**card["recipe"], "generate": {**card["recipe"]["generate"], **settings}})
            began = time.monotonic()
            for split, source in (("validation", None), ("test", "validation")):
                out = f"{demo}/corrections/{turn}-{split}"
                generate_run(recipe, f"{demo}/data/{split}", f"{demo}/model", out, Request())
                options = Options(threshold_from=f"{demo}/corrections/{turn}-{source}" if source else None)
                metrics = reduce(open_run(out), options).metrics
            place, counterfactual = (
                of(metrics, "localization", map="positive", label="all"),
                of(metrics, "ground_truth", label="all"),
            )
            table.append(
                {
                    "recipe": name,
                    "auroc": place["auroc"],
                    "auprc": place["auprc"],
                    "dice_fixed": place["dice_fixed"],
                    "auroc_absolute": of(metrics, "localization", map="absolute", label="all")["auroc"],
                    "flip_rate": of(metrics, "validity", label="all")["flip_rate"],
                    "lesion_error_left": counterfactual["lesion_error_ratio"],
                    "psnr_counterfactual": counterfactual["psnr"],
                    "unet_calls": calls(recipe.generate.model_dump(), len(recipe.data.prompts)).unet,
                    "seconds": round(time.monotonic() - began),
                }
            )
    for name in BASELINES:
        place = of(metrics, "localization", map=name, label="all")
        table.append({"recipe": f"baseline: {name}", **{key: place[key] for key in ("auroc", "auprc", "dice_fixed")}})
    about = {
        "command": f"python experiments/corrections.py --demo {demo}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "versions": {name: version(name) for name in ("torch", "diffusers", "ray")},
        "code_revision": code_revision(),
        "model_digest": card["digest"],
        "test_images": metrics["records"]["ok"],
        "table": table,
    }
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(about, indent=1))
    click.echo(pd.DataFrame(table).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
