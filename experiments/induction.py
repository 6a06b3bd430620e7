"""Induce disease by text in three training conditions, on healthy phantoms of an unseen seed.

    python experiments/induction.py [--work runs/induction] [--steps 2000] [--images 40]

- *labels*: training uses the class alone, as in the paper; side and grade in a prompt are unseen words.
- *held-out*: captions with grade and side, without the combinations HELD_OUT: compositional zero-shot.
- *captions*: all combinations.

All conditions start from one autoencoder. Left and right are the patient's. What a prompt adds is the difference
between the image's counterfactuals under this prompt and under the healthy prompt, from the same noise. No condition
has seen cardiomegaly.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from diffva_ray.config.recipe import Recipe, load_recipe, make_recipe
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.lungs import find_lungs
from diffva_ray.data.phantoms import CAPTIONS, phantom_set
from diffva_ray.evaluate.drawing import INK, MUTED, png
from diffva_ray.evaluate.records import as_records, by_shard, read_images, read_records, read_truth
from diffva_ray.generate.plan import Request
from diffva_ray.generate.run import Run, open_run
from diffva_ray.metrics.cardiothoracic import cardiothoracic_ratio
from diffva_ray.progress import LOG, set_up_logging
from diffva_ray.provenance import code_revision, version
from diffva_ray.storage.opening import open_store
from diffva_ray.train.checkpoint import Checkpoints
from diffva_ray.train.loop import train
from diffva_ray.workflows.execution import Execution
from diffva_ray.workflows.generate import generate_run

Image = NDArray[np.float32]
CLASSES = ("Normal", "Lung_Opacity", "COVID", "Viral Pneumonia", "Pneumothorax", "Mass")
HELD_OUT = {("Mass", "left"), ("Pneumothorax", "right")}
SIDED = ("Lung Opacity", "Pneumothorax", "Mass")
GRADES = ("mild", "moderate", "severe")
HEALTHY = "normal chest scan"
DARK = "Pneumothorax"  # the only finding that is darker than healthy tissue
INDUCING = {
    "method": "sdedit", "scheduler": "ddim", "strength": 0.85, "guidance_scale": 4.0, "num_inference_steps": 30,
    "source_prompt": "", "negative_prompt": "", "smoothing": 0.0,
}  # fmt: skip
SIDES = [f"severe {finding} on the {side}" for finding in SIDED for side in ("left", "right")]
NEVER = [f"severe COVID 19 on the {side}" for side in ("left", "right")]  # bilateral in all training images
GRADED = [f"{grade} {what}" for what in ("Lung Opacity on the left", "Viral Pneumonia, bilateral") for grade in GRADES]
UNSEEN = ["Cardiomegaly", "heart enlarged"]
PROMPTS = list(dict.fromkeys([HEALTHY, *SIDES, *NEVER, *GRADED, *UNSEEN]))


def manifests(data: Path) -> dict[str, str]:
    """Return the training manifest of each condition."""
    images = open_dataset(data / CAPTIONS).images
    kept = [
        image
        for image in images
        if not any(image.caption.endswith(f"{label} on the {side}") for label, side in HELD_OUT)
    ]
    rows = {
        "labels": [(image.path, image.label, "") for image in images],
        "held-out": [(image.path, image.label, image.caption) for image in kept],
        "captions": [(image.path, image.label, image.caption) for image in images],
    }
    for name, lines in rows.items():
        with open(data / f"told-{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([("path", "label", "caption"), *lines])
    return {name: str(data / f"told-{name}.csv") for name in rows}


def recipe_of(steps: int, autoencoder_steps: int) -> Recipe:
    values = load_recipe("phantom").model_dump(mode="json")
    first, joint, _ = values["train"]["stages"]
    first |= {"steps": autoencoder_steps}
    joint |= {"steps": steps, "classes": {"Normal": 2, **dict.fromkeys(CLASSES[1:], 1)}}
    values["train"] |= {"stages": [first, joint], "checkpoints_to_keep": 100}
    values["data"]["prompts"] |= {label: label for label in ("Pneumothorax", "Mass")}
    values["generate"] |= INDUCING
    return make_recipe(values)


def trained(work: Path, recipe: Recipe, told: dict[str, str], threads: int) -> dict[str, str]:
    """Train a model per condition, from the autoencoder of the first."""
    models: dict[str, str] = {}
    start: Path | None = None
    for name, data in told.items():
        model = work / name
        keep = Checkpoints(model / ".train", 100)
        if start is not None and keep.latest() is None:
            shutil.copytree(start, model / ".train" / start.name)
        if not (model / "diffva.json").exists():
            train(
                recipe,
                data,
                str(model),
                fingerprint="induction",
                provenance={"data_kind": "phantoms"},
                report=keep,
                resume=keep.latest(),
                threads=threads,
            )
        if start is None:
            start = next(folder for folder in sorted((model / ".train").iterdir()) if _begins_denoiser(folder))
        models[name] = str(model)
    return models


def _begins_denoiser(folder: Path) -> bool:
    state = folder / "state.json"
    return state.exists() and {"stage": 1, "step": 0}.items() <= json.loads(state.read_text()).items()


def counterfactuals(run: Run) -> tuple[dict[str, dict[str, Image]], dict[str, NDArray[np.bool_]], dict[str, Image]]:
    """Return the counterfactuals by prompt and image, lung masks by image, and the images."""
    found: dict[str, dict[str, Image]] = defaultdict(dict)
    lungs, images = {}, {}
    for members in by_shard(as_records(read_records(run))).values():
        for row in members:
            made = read_images(run, row)
            found[row["prompt"]][row["image_path"]] = made.counterfactual
            lungs[row["image_path"]] = read_truth(run, row, {}).region
            images[row["image_path"]] = made.image
    return found, lungs, images


def added(found: dict[str, dict[str, Image]], prompt: str, image: str) -> Image:
    """Return the brightness that the prompt adds to the image [size, size], >= 0."""
    change = found[prompt][image] - found[HEALTHY][image]
    return np.clip(-change if DARK in prompt else change, 0, None)


def share_on(side: str, change: Image, lungs: NDArray[np.bool_]) -> float:
    """Return the share of the change inside the lungs that is in the patient's left or right half."""
    columns = np.flatnonzero(lungs.any(axis=0))
    middle = (columns.min() + columns.max() + 1) / 2
    inside = np.where(lungs, change, 0)
    at = np.arange(lungs.shape[1])
    named = inside[:, at >= middle] if side == "left" else inside[:, at < middle]  # image right is the patient's left
    return float(named.sum() / max(inside.sum(), 1e-9))


def scores(run: Run) -> dict[str, Any]:
    found, lungs, images = counterfactuals(run)
    names = sorted(images)
    row: dict[str, Any] = {}
    for prompt in [*SIDES, *NEVER]:
        side = prompt.rsplit(" ", 1)[1]
        shares = [share_on(side, added(found, prompt, image), lungs[image]) for image in names]
        row[prompt] = {"right side": float(np.mean(np.array(shares) > 0.5)), "share on it": float(np.mean(shares))}
    for start in range(0, len(GRADED), len(GRADES)):
        amounts = np.array(
            [[added(found, prompt, image)[lungs[image]].mean() for image in names] for prompt in GRADED[start:][:3]]
        )
        row[GRADED[start].partition(" ")[2]] = {
            "severe over mild": float(np.mean(amounts[2] > amounts[0])),
            "in order": float(np.mean((amounts[0] < amounts[1]) & (amounts[1] < amounts[2]))),
            **{f"amount {grade}": float(amount) for grade, amount in zip(GRADES, amounts.mean(axis=1), strict=True)},
        }
    for prompt in UNSEEN:
        ratios = [(_heart(found[HEALTHY][image]), _heart(found[prompt][image])) for image in names]
        known = np.array([pair for pair in ratios if None not in pair], float)
        row[prompt] = {"n": len(known), "heart / thorax before": known[:, 0].mean(), "after": known[:, 1].mean()}
    return row


def _heart(image: Image) -> float | None:
    lungs = find_lungs(image)
    return None if lungs is None else cardiothoracic_ratio(lungs)


def picture(runs: dict[str, Run], folder: Path) -> None:
    """Draw an image under each of the sided prompts, one row per condition."""
    shown = [HEALTHY, *SIDES, NEVER[0]]
    size, left, top = 1.25, 0.95, 0.62
    width, height = left + (len(shown) + 1) * size + 0.1, top + len(runs) * size + 0.1
    figure = Figure(figsize=(width, height), facecolor="white")
    for row, (name, run) in enumerate(runs.items()):
        found, _, images = counterfactuals(run)
        image = sorted(images)[3]
        bottom = height - top - (row + 1) * size
        figure.text(0.1 / width, (bottom + size / 2) / height, name, fontsize=9, color=INK, va="center")
        for column, prompt in enumerate(["image", *shown]):
            pixels = images[image] if prompt == "image" else found[prompt][image]
            axes = figure.add_axes(
                ((left + column * size) / width, bottom / height, 0.97 * size / width, 0.97 * size / height)
            )
            axes.set_axis_off()
            axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="bicubic")
            if row == 0:
                axes.set_title(prompt.replace(" on the ", "\non the "), fontsize=7, color=MUTED, pad=3)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "induction.png").write_bytes(png(figure))


def made(work: Path, images: int) -> tuple[Path, str]:
    data, test = work / "train-images", work / "test-images"
    for folder, count, seed, classes in ((data, 3000, 300, CLASSES), (test, images, 303, ("Normal",))):
        if not (folder / "phantoms.json").exists():
            for _ in phantom_set(open_store(str(folder)), count, 64, seed, classes):
                pass
    return data, str(test)


@click.command()
@click.option("--work", default="runs/induction", show_default=True, type=click.Path(path_type=Path))
@click.option("--steps", default=2000, show_default=True, help="Training steps of UNet and text encoder.")
@click.option("--autoencoder-steps", default=550, show_default=True)
@click.option("--images", default=40, show_default=True, help="Healthy test images.")
@click.option("--threads", default=1, show_default=True)
@click.option("--result", default="experiments/results/induction.json", type=click.Path(path_type=Path))
@click.option("--pictures", default="docs/images", type=click.Path(path_type=Path))
def main(
    work: Path, steps: int, autoencoder_steps: int, images: int, threads: int, result: Path, pictures: Path
) -> None:
    set_up_logging()
    torch.set_num_threads(threads)
    work = work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    data, test = made(work, images)
    recipe = recipe_of(steps, autoencoder_steps)
    models = trained(work, recipe, manifests(data), threads)
    table, runs = {}, {}
    request = Request(classes=("Normal",), sweep=(("prompt", tuple(PROMPTS)),))
    for name, model in models.items():
        LOG.info("condition %s", name)
        out = str(work / f"run-{name}")
        generate_run(recipe, test, model, out, request, Execution(executor="inline"))
        runs[name] = open_run(out)
        table[name] = scores(runs[name])
    about = {
        "command": f"python experiments/induction.py --steps {steps} --images {images}",
        "autoencoder_steps": autoencoder_steps,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "versions": {key: version(key) for key in ("torch", "diffusers", "transformers")},
        "code_revision": code_revision(),
        "held_out": sorted(" on the ".join(pair) for pair in HELD_OUT),
        "settings": INDUCING,
        "conditions": table,
    }
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(about, indent=1))
    picture(runs, pictures)
    flat = {name: {f"{prompt}: {key}": value for prompt, row in rows.items() for key, value in row.items()}
            for name, rows in table.items()}  # fmt: skip
    click.echo(pd.DataFrame(flat).round(3).to_string())


if __name__ == "__main__":
    main()
