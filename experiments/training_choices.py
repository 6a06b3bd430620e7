"""Measure the effect of each training choice on phantoms: every row trains the denoiser again from one autoencoder.

    make demo && python experiments/training_choices.py [--steps 1000] [--only mixed ...]

All rows have the same number of steps, the same batch of images and the same autoencoder; the last column has the extra
cost of a class set (DreamBooth doubles the batch). Scores use the 120 abnormal validation phantoms, with the recipe's
own sampler and with the paper's. One training seed: differences below about 0.01 are noise.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import click
import pandas as pd

from diffva_ray.config.recipe import Recipe, load_recipe, make_recipe
from diffva_ray.evaluate.reduction import Options
from diffva_ray.generate.plan import Request
from diffva_ray.generate.run import open_run
from diffva_ray.model.card import read_card
from diffva_ray.progress import set_up_logging
from diffva_ray.provenance import code_revision, version
from diffva_ray.storage.opening import open_store
from diffva_ray.train.checkpoint import Checkpoints
from diffva_ray.train.loop import train
from diffva_ray.workflows.execution import Execution
from diffva_ray.workflows.generate import generate_run
from diffva_ray.workflows.reduce import reduce

ABNORMAL = {"Lung_Opacity": 1, "COVID": 1, "Viral Pneumonia": 1}
MIXED: dict[str, Any] = {
    "trains": "denoiser", "batch_size": 16, "learning_rate": 3.0e-3, "warmup_steps": 30, "schedule": "cosine",
    "betas": [0.9, 0.99], "ema_decay": 0.995, "prompt_dropout": 0.1, "classes": {"Normal": 2, **ABNORMAL},
}  # fmt: skip
SHARES = {"Normal": 1200, "Lung_Opacity": 500, "COVID": 500, "Viral Pneumonia": 500}  # the paper's schedule


def mixed(steps: int, **changes: Any) -> list[dict[str, Any]]:
    return [{**MIXED, "name": "joint", "steps": steps, **changes}]


def sequential(steps: int, prior: bool, **changes: Any) -> list[dict[str, Any]]:
    """Return the stages in the paper's order and proportions; class set Normal from the second stage on."""
    plain = {"prompt_dropout": 0.0, "ema_decay": None, "schedule": "constant", **changes}
    return [
        {**MIXED, **plain, "name": label, "classes": {label: 1}, "steps": round(steps * share / sum(SHARES.values())),
         "prior_class": "Normal" if prior and label != "Normal" else None}
        for label, share in SHARES.items()
    ]  # fmt: skip


def choices(steps: int) -> dict[str, list[dict[str, Any]]]:
    return {
        "mixed, dropout 0.1, EMA, cosine, joint": mixed(steps),
        "the paper's sequence, with prior preservation": sequential(steps, True),
        "the paper's sequence, without": sequential(steps, False),
        "text encoder frozen": mixed(steps, train_text_encoder=False),
        "prompt dropout 0": mixed(steps, prompt_dropout=0.0),
        "min-SNR 5": mixed(steps, snr_gamma=5.0),
        "with a class set (prior Normal)": mixed(steps, classes=ABNORMAL, prior_class="Normal"),
    }


PAPER = {
    "method": "sdedit", "scheduler": "pndm", "strength": 0.55, "guidance_scale": 4.0, "num_inference_steps": 75,
    "source_prompt": "", "negative_prompt": "",
}  # fmt: skip


def score(recipe: Recipe, data: str, model: str, out: str) -> dict[str, float]:
    """The scores of a model on the abnormal images of a data set with ground truth."""
    generate_run(recipe, data, model, out, Request(), Execution(executor="inline"))
    metrics = reduce(open_run(out), Options(), executor="inline").metrics

    def of(table: str, key: str, **match: Any) -> float:
        rows = [row for row in metrics[table] if all(row[name] == value for name, value in match.items())]
        return next(row[key] for row in rows if row["label"] == "all")

    return {
        "auroc": of("localization", "auroc", map="positive"),
        "dice_best": of("localization", "dice_best", map="positive"),
        "flip_rate": of("validity", "flip_rate"),
        "lesion_error_left": of("ground_truth", "lesion_error_ratio"),
        "psnr_counterfactual": of("ground_truth", "psnr"),
    }


def autoencoder(base: Recipe, demo: str, folder: Path, threads: int) -> tuple[Path, dict[str, Any]]:
    """Train the autoencoder of ``base`` once; return the checkpoint with it and the initial denoiser, and its stage."""
    values = base.model_dump(mode="json")
    stage = values["train"]["stages"][0]
    values["train"] |= {"stages": [stage], "checkpoints_to_keep": 100}
    keep = Checkpoints(folder / ".train", 100)
    if not (folder / "diffva.json").exists():
        train(
            make_recipe(values),
            f"{demo}/data/train",
            str(folder),
            fingerprint="choices",
            provenance={},
            report=keep,
            resume=keep.latest(),
            threads=threads,
        )
    start = keep.latest()
    assert start is not None
    return start, stage


def train_from(start: Path, recipe: Recipe, data: str, model: Path, threads: int) -> bool:
    """Train the stages after the checkpoint ``start``, unless they were; returns whether it did."""
    if (model / "diffva.json").exists():
        return False
    report = Checkpoints(model / ".train", 1)
    shutil.copytree(start, model / ".train" / start.name, dirs_exist_ok=True)
    train(
        recipe, data, str(model), fingerprint="choices", provenance={}, report=report, resume=report.latest(),
        threads=threads,
    )  # fmt: skip
    return True


@click.command()
@click.option("--demo", default="runs/demo", show_default=True, help="A finished `diffva demo`.")
@click.option("--steps", default=1000, show_default=True, help="Training steps of the denoiser in every row.")
@click.option("--threads", default=1, show_default=True)
@click.option("--only", multiple=True, metavar="ROW", help="Compute only the rows that contain this text.")
@click.option("--result", default="experiments/results/training_choices.json", type=click.Path(path_type=Path))
def main(demo: str, steps: int, threads: int, only: tuple[str, ...], result: Path) -> None:
    set_up_logging()
    work = Path(demo) / "choices"
    base = load_recipe("phantom")
    start, stage = autoencoder(base, demo, work / "autoencoder", threads)
    values = base.model_dump(mode="json")

    table = []
    for name, denoiser in choices(steps).items():
        if only and not any(text in name for text in only):
            continue
        model = work / f"{steps}-{'-'.join(''.join(c if c.isalnum() else ' ' for c in name).split())}"
        values["train"] |= {"stages": [stage, *denoiser], "checkpoints_to_keep": 1}
        recipe = make_recipe(values)
        began = time.monotonic()
        if train_from(start, recipe, f"{demo}/data/train", model, threads):
            (model / "seconds.txt").write_text(f"{time.monotonic() - began:.0f}")
            shutil.copytree(Path(demo) / "model" / "judge", model / "judge", dirs_exist_ok=True)
        seconds = float((model / "seconds.txt").read_text())
        paper = make_recipe({**values, "generate": {**values["generate"], **PAPER}})
        row: dict[str, Any] = {"choice": name}
        validation = f"{demo}/data/validation"
        row |= score(recipe, validation, str(model), str(model / "run"))
        papers = score(paper, validation, str(model), str(model / "paper"))
        row |= {f"paper_{key}": value for key, value in papers.items()}
        table.append({**row, "seconds": seconds})
        card = read_card(open_store(f"{demo}/model"))
        about = {
            "command": f"python experiments/training_choices.py --demo {demo} --steps {steps} --threads {threads}",
            "machine": f"{platform.machine()}, {threads} thread(s), no GPU",
            "versions": {key: version(key) for key in ("torch", "diffusers", "transformers")},
            "code_revision": code_revision(),
            "judge_of_model": card["digest"] if card else None,
            "table": table,
        }
        result.parent.mkdir(parents=True, exist_ok=True)
        result.write_text(json.dumps(about, indent=1))
    click.echo(pd.DataFrame(table).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
