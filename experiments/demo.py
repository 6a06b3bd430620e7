"""Collect the results of a finished demo for the table of README.md and docs/index.md.

    make demo && python experiments/demo.py [--demo runs/demo]

The numbers are read from the runs' tables/metrics.json; nothing is computed here.
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
from diffva_ray.provenance import version

BASELINES = ("brightness", "autoencoder_difference", "centre_prior")


def row_of(metrics: dict[str, Any], name: str, map_name: str, judged: bool) -> dict[str, Any]:
    """Return one row: localization of the map ``map_name``, and with ``judged`` the flip rate and lesion error."""
    rows = [row for row in metrics["localization"] if row["map"] == map_name]
    total = overall(rows) or {}
    row = {"row": name, "auroc": total["auroc"], "auroc_interval": total["auroc_interval"],
           "auroc_by_class": {one["label"]: one["auroc"] for one in rows if one is not total},
           "dice_fixed": total["dice_fixed"]}  # fmt: skip
    if judged:
        row["flip_rate"] = (overall(metrics["validity"]) or {})["flip_rate"]
        row["lesion_error_left"] = (overall(metrics["ground_truth"]) or {})["lesion_error_ratio"]
    return row


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
    rows += [row_of(ours, f"baseline: {name.replace('_', ' ')}", name, False) for name in BASELINES]
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
