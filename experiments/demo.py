"""Collect the results of a finished demo for the table of README.md and docs/index.md.

    make demo && python experiments/demo.py [--demo runs/demo]

The numbers are read from the runs' tables/metrics.json.
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import click

from diffva_ray.evaluate.records import reduced_metrics
from diffva_ray.evaluate.tables import overall
from diffva_ray.generate.run import open_run
from diffva_ray.metrics.baselines import BASELINES, SHUFFLED
from diffva_ray.provenance import version


def row_of(metrics: dict[str, Any], name: str, map_name: str, judged: bool) -> dict[str, Any]:
    """Return one row: localization of the map ``map_name``, and with ``judged`` the flip rate and lesion error."""
    rows = [row for row in metrics["localization"] if row["map"] == map_name]
    total = overall(rows) or {}
    row = {"row": name, "auroc": total["auroc"], "auroc_interval": total["auroc_interval"],
           "auroc_by_class": {one["label"]: one["auroc"] for one in rows if one is not total},
           "dice_fixed": total.get("dice_fixed"),
           **{key: total[key] for key in ("baseline", "minus_baseline", "minus_baseline_interval") if key in total},
           }  # fmt: skip
    if judged:
        row["flip_rate"] = (overall(metrics["validity"]) or {})["flip_rate"]
        truth = overall(metrics["ground_truth"]) or {}
        row |= {"lesion_error_left": truth["lesion_error_ratio"], "psnr": truth["psnr"]}
    return row


def controls(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the untouched image and of the ground truth: floor and ceiling of a counterfactual."""
    validity, truth = (overall(metrics[table]) or {} for table in ("validity", "ground_truth"))
    return [
        {"row": "the untouched image", "flip_rate": validity["called_healthy_before"], "lesion_error_left": 1.0,
         "psnr": truth["psnr_input"]},
        {"row": "the autoencoder alone", "flip_rate": validity.get("flip_rate_reconstruction"),
         "psnr": truth["psnr_reconstruction"]},
        {"row": "the ground truth", "flip_rate": validity.get("flip_rate_ground_truth"), "lesion_error_left": 0.0},
    ]  # fmt: skip


@click.command()
@click.option("--demo", default="runs/demo", show_default=True)
@click.option("--result", default="experiments/results/demo.json", type=click.Path(path_type=Path))
def main(demo: str, result: Path) -> None:
    run = open_run(f"{demo}/run")
    ours, paper = reduced_metrics(run), reduced_metrics(open_run(f"{demo}/paper"))
    if ours is None or paper is None:
        raise click.ClickException(f"{demo}: not a finished demo; run make demo first")
    rows = [row_of(ours, "recipe `phantom`", "positive", True)]
    rows.append(row_of(paper, "the paper's settings (PNDM aligned), same model", "positive", True))
    rows += controls(ours)
    rows += [
        row_of(ours, f"baseline: {name.replace('_', ' ').replace('pca', 'PCA')}", name, False) for name in BASELINES
    ]
    rows.append(row_of(ours, "our map, of another image", SHUFFLED, False))
    about = {
        "command": "make demo && python experiments/demo.py",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "versions": {key: version(key) for key in ("torch", "diffusers")},
        "code_revision": run.about["code_revision"],
        "model_digest": run.keys["model_digest"],
        "images": ours["records"]["ok"],
        "rows": rows,
    }
    result.write_text(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
