"""Measure what an expert's corrected regions do to the threshold and to Dice, on the demo's phantoms.

    make demo && python experiments/feedback.py

A simulated expert saves verdicts in the studio on records of the demo's validation run and paints regions: exactly the
lesions, or with a generous brush. ``feedback/manifest.csv`` is then validation data (docs/guides/studio.md),
and its threshold scores the demo's test run against the phantoms' own lesions.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
from scipy.ndimage import binary_dilation

from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.masks import read_mask
from diffva_ray.evaluate.reduction import Options
from diffva_ray.generate.plan import Request
from diffva_ray.generate.run import open_run
from diffva_ray.progress import set_up_logging
from diffva_ray.provenance import code_revision
from diffva_ray.studio.feedback import save_verdict
from diffva_ray.studio.workspace import Workspace
from diffva_ray.workflows.execution import Execution
from diffva_ray.workflows.generate import generate_run
from diffva_ray.workflows.reduce import reduce

PAGE = 0.05  # threshold at which the studio shows a map, and a study marks a region without another
INLINE = Execution(executor="inline")
ROWS = [
    ("nobody", 0, 0),
    ("exact", 6, 0),
    ("exact", 24, 0),
    ("generous", 24, 3),
]  # expert, images, brush's excess in px


def corrected(demo: Path, folder: Path, count: int, excess: int) -> str:
    """Address of a reduced run on the verdicts of an expert about ``count`` records."""
    run = open_run(f"{demo}/validation")
    workspace = Workspace(str(folder), f"{demo}/model", run=run)
    dataset = open_dataset(run.about["data"])
    lesions = {image.path: image.lesion_mask for image in dataset.images}
    names = [name for _, name in workspace.history()]
    for name in names[:: len(names) // count][:count]:
        reply = workspace.reply(name)
        region = read_mask(dataset.store, lesions[reply.record["image_path"]], reply.record["width"])
        assert region is not None
        region = binary_dilation(region, iterations=excess) if excess else region
        save_verdict(workspace, reply, "rejected", reply.record["label"], np.asarray(region))
    out = f"{folder}/corrected"
    generate_run(run.recipe, f"{folder}/feedback/manifest.csv", f"{demo}/model", out, Request(), INLINE)
    reduce(open_run(out), Options(), "inline")
    return out


@click.command()
@click.option(
    "--demo", default="runs/demo", show_default=True, help="A finished `diffva demo`; its test run is reduced again."
)
@click.option("--result", default="experiments/results/feedback.json", type=click.Path(path_type=Path))
def main(demo: str, result: Path) -> None:
    set_up_logging()
    table = list[dict[str, Any]]()
    for expert, count, excess in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            if count:
                source = corrected(Path(demo), Path(folder), count, excess)
            else:
                source = folder
                (Path(folder) / "tables").mkdir()
                (Path(folder) / "tables/thresholds.json").write_text(json.dumps({"absolute": PAGE, "positive": PAGE}))
            metrics = reduce(open_run(f"{demo}/run"), Options(threshold_from=source), "inline").metrics
        row = next(row for row in metrics["localization"] if row["map"] == "absolute" and row["label"] == "all")
        table.append(
            {"expert": expert, "images": count, "threshold": row["threshold"], "dice_fixed": row["dice_fixed"]}
        )
    about = {
        "command": "python experiments/feedback.py",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "code_revision": code_revision(),
        "test_images": metrics["records"]["ok"],
        "table": table,
    }
    result.write_text(json.dumps(about, indent=1))
    click.echo(pd.DataFrame(table).round(4).to_string(index=False))


if __name__ == "__main__":
    main()
