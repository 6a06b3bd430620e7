"""Learning curve over the number of training images: how modest may the data be? (the paper, lines 59 and 63)

    make demo && python experiments/modest_data.py [--steps 1000]

Each row trains the denoiser again for the same number of steps from one autoencoder, which stands for the pretrained
base, on a random sample of N phantoms of each class; a smaller sample is part of a larger one. Scores use the abnormal
validation phantoms; the judge has seen all training images. ``nearer_to_training`` is the share of counterfactuals that
are nearer to one of the healthy training images than to as many unseen ones, with its range without memory.
"""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path
from typing import Any

import click
import pandas as pd
from training_choices import PAPER, autoencoder, mixed, score, train_from

from diffva_ray.config.recipe import load_recipe, make_recipe
from diffva_ray.data.datasets import open_dataset
from diffva_ray.generate.run import open_run
from diffva_ray.metrics.counterfactual import memorisation
from diffva_ray.paper.extras import audit_counterfactuals, audit_images
from diffva_ray.paper.inputs import copy_images, sampled
from diffva_ray.progress import set_up_logging
from diffva_ray.provenance import code_revision, version

SIZES = (3, 10, 30, 100, 300, 750)  # images of each of the four classes


def audit(run: str, train: str, unseen: str, label: str) -> dict[str, Any]:
    sets = [open_dataset(uri, classes=[label]) for uri in (train, unseen)]
    seen, held_out = (audit_images(dataset.store, dataset.images) for dataset in sets)
    found = memorisation(audit_counterfactuals(open_run(run)), seen, held_out)
    return {"nearer_to_training": found.nearer, "without_memory": list(found.without_memory)}


@click.command()
@click.option("--demo", default="runs/demo", show_default=True, help="A finished `diffva demo`.")
@click.option("--steps", default=1000, show_default=True, help="Training steps of the denoiser in every row.")
@click.option("--threads", default=1, show_default=True)
@click.option("--result", default="experiments/results/modest_data.json", type=click.Path(path_type=Path))
def main(demo: str, steps: int, threads: int, result: Path) -> None:
    set_up_logging()
    work = Path(demo) / "modest"
    base = load_recipe("phantom")
    start, stage = autoencoder(base, demo, work / "autoencoder", threads)
    dataset = open_dataset(f"{demo}/data/train", base.data)
    table = []
    for size in SIZES:
        data, model = str(work / f"train-{size}"), work / f"model-{size}"
        copy_images(dataset, sampled(dataset.images, size), data)
        values = base.model_dump(mode="json")
        values["train"] |= {"stages": [stage, *mixed(steps)], "checkpoints_to_keep": 1}
        train_from(start, make_recipe(values), data, model, threads)
        shutil.copytree(Path(demo) / "model" / "judge", model / "judge", dirs_exist_ok=True)
        row: dict[str, Any] = {"images_per_class": size}
        validation = f"{demo}/data/validation"
        row |= score(make_recipe(values), validation, str(model), str(model / "run"))
        row |= audit(str(model / "run"), data, f"{demo}/data/test", base.data.healthy_class)
        paper = make_recipe({**values, "generate": {**values["generate"], **PAPER}})
        papers = score(paper, validation, str(model), str(model / "paper"))
        row |= {f"paper_{key}": value for key, value in papers.items()}
        table.append(row)
        about = {
            "command": f"python experiments/modest_data.py --demo {demo} --steps {steps} --threads {threads}",
            "machine": f"{platform.machine()}, {threads} thread(s), no GPU",
            "versions": {key: version(key) for key in ("torch", "diffusers", "transformers")},
            "code_revision": code_revision(),
            "training_seeds": 1,
            "table": table,
        }
        result.parent.mkdir(parents=True, exist_ok=True)
        result.write_text(json.dumps(about, indent=1) + "\n")
    click.echo(pd.DataFrame(table).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
