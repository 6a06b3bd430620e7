"""Train a classifier on few labelled phantoms, with and without counterfactuals of them: does it classify unseen ones
better?

    make demo && python experiments/downstream.py [--images 10,30] [--seeds 5]

Rows, for N labelled images of each class: the images alone; with their counterfactuals (every abnormal image under the
healthy prompt, labelled healthy; every healthy image under each disease's prompt, labelled with it); with as many
further labelled images instead, which is what counterfactuals stand for. All rows train the judge's network for the
same number of steps on batches with equal classes, with shifts, scaling and noise as augmentation. Counterfactuals are
the demo model's, which has seen 3000 images with labels: a row says what such a model can pass on, not that N images
would do. Tests use the demo's unseen images. Intervals: bootstrap over test images of the mean over seeds.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import torch
from attribution import rank_auroc
from numpy.typing import NDArray
from torch.nn import functional

from diffva_ray.config.recipe import Recipe, make_recipe
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.images import read_image
from diffva_ray.evaluate.records import grey, read_records
from diffva_ray.generate.plan import Request
from diffva_ray.generate.run import Run, open_run
from diffva_ray.metrics.intervals import paired_difference
from diffva_ray.metrics.validity import Judge
from diffva_ray.model.recipe import model_recipe
from diffva_ray.paper.inputs import copy_images, sampled
from diffva_ray.progress import LOG, set_up_logging
from diffva_ray.provenance import code_revision, version
from diffva_ray.workflows.execution import Execution
from diffva_ray.workflows.generate import generate_run

Images = NDArray[np.float32]
Labelled = tuple[Images, NDArray[np.int64]]  # images [n, H, W] and classes [n]
INDUCED = {"method": "sdedit", "scheduler": "ddim", "strength": 0.85, "guidance_scale": 4.0, "num_inference_steps": 20,
           "source_prompt": "", "negative_prompt": ""}  # fmt: skip
STEPS, BATCH = 400, 32


def read(uri: str, classes: list[str]) -> Labelled:
    dataset = open_dataset(uri)
    images = np.stack([read_image(f"{uri}/{image.path}") for image in dataset.images])
    return images, np.array([classes.index(image.label) for image in dataset.images])


def counterfactuals(run: Run, recipe: Recipe, classes: list[str]) -> Labelled:
    """The counterfactuals of a run, labelled with the class of their prompt."""
    of_prompt = {recipe.data.prompt(label): label for label in classes} | {
        recipe.data.healthy_prompt: recipe.data.healthy_class
    }
    records = read_records(run)
    images = np.stack([grey(run.store, path) for path in records["counterfactual_path"]])
    return images, np.array([classes.index(of_prompt[prompt]) for prompt in records["prompt"]])


def made(recipe: Recipe, model: str, data: str, folder: Path, classes: list[str]) -> Labelled:
    """Healthy counterfactuals of the abnormal images, and induced diseases in the healthy ones."""
    healthy = recipe.data.healthy_class
    abnormal = tuple(label for label in classes if label != healthy)
    inducing = make_recipe({**recipe.model_dump(mode="json"),
                            "generate": {**recipe.generate.model_dump(mode="json"), **INDUCED}})  # fmt: skip
    prompts = tuple(recipe.data.prompt(label) for label in abnormal)
    inline = Execution(executor="inline")
    generate_run(recipe, data, model, str(folder / "healthy"), Request(classes=abnormal), inline)
    request = Request(classes=(healthy,), sweep=(("prompt", prompts),))
    generate_run(inducing, data, model, str(folder / "induced"), request, inline)
    parts = [counterfactuals(open_run(str(folder / name)), recipe, classes) for name in ("healthy", "induced")]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def augmented(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images [n, H, W], each shifted and scaled by up to a tenth, with other contrast and noise."""
    n = len(images)
    scale = 1 + 0.1 * (2 * torch.rand(n, generator=generator) - 1)
    shift = 0.1 * (2 * torch.rand(n, 2, generator=generator) - 1)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale, scale, shift
    grid = functional.affine_grid(theta, [n, 1, *images.shape[1:]], align_corners=False)
    moved = functional.grid_sample(images[:, None], grid, padding_mode="border", align_corners=False)[:, 0]
    gain = torch.exp(0.1 * torch.randn(n, 1, 1, generator=generator))
    return (moved * gain + 0.02 * torch.randn(moved.shape, generator=generator)).clamp(0, 1)


def trained(data: Labelled, classes: list[str], healthy: str, seed: int) -> Judge:
    pixels, truth = torch.from_numpy(data[0]), torch.from_numpy(data[1])
    torch.manual_seed(seed)
    network, generator = Judge(classes, healthy), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, STEPS)
    members = [torch.nonzero(truth == label)[:, 0] for label in range(len(classes))]
    for _ in range(STEPS):
        rows = torch.cat(
            [of[torch.randint(0, len(of), (BATCH // len(classes),), generator=generator)] for of in members]
        )
        loss = functional.cross_entropy(network(augmented(pixels[rows], generator)), truth[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.inference_mode()
def tested(network: Judge, data: Labelled) -> tuple[NDArray[np.float64], dict[str, float]]:
    """Whether each test image is classified rightly [n], and AUROC of disease and of the classes (one against rest)."""
    chances = network(torch.from_numpy(data[0])).softmax(1).double().numpy()
    healthy = network.classes.index(network.healthy)

    def auroc(label: int) -> float:
        return rank_auroc(chances[data[1] == label, label], chances[data[1] != label, label])

    of_classes, ill = [auroc(label) for label in range(len(network.classes))], auroc(healthy)
    right = (chances.argmax(1) == data[1]).astype(np.float64)
    return right, {"accuracy": right.mean(), "auroc_disease": ill, "auroc_classes": float(np.mean(of_classes))}


@click.command()
@click.option("--demo", default="runs/demo", show_default=True, help="A finished `diffva demo`.")
@click.option("--images", default="10,30", show_default=True, help="Labelled images of each class.")
@click.option("--seeds", default=5, show_default=True, help="Samples of labelled images, each with its training.")
@click.option("--threads", default=1, show_default=True)
@click.option("--result", default="experiments/results/downstream.json", type=click.Path(path_type=Path))
def main(demo: str, images: str, seeds: int, threads: int, result: Path) -> None:
    set_up_logging()
    torch.set_num_threads(threads)
    model, work = f"{demo}/model", Path(demo) / "downstream"
    recipe = model_recipe(model, None, ())
    dataset, healthy = open_dataset(f"{demo}/data/train", recipe.data), recipe.data.healthy_class
    classes = sorted(recipe.data.prompts)
    test = read(f"{demo}/data/test", classes)
    table, right = [], dict[tuple[int, str], list[NDArray[np.float64]]]()
    for size in map(int, images.split(",")):
        for seed in range(seeds):
            folder = work / f"{size}-{seed}"
            labelled = copy_images(dataset, sampled(dataset.images, size, seed), str(folder / "images"))
            own = read(labelled, classes)
            added = made(recipe, model, labelled, folder, classes)
            # As many images of each class as the second row has.
            counts = dict(zip(classes, size + np.bincount(added[1], minlength=len(classes)), strict=True))
            more = [
                image
                for label, count in counts.items()
                for image in sampled(dataset.images, count, seed)
                if image.label == label
            ]
            further = read(copy_images(dataset, more, str(folder / "further")), classes)
            rows = {
                "images alone": own,
                "with their counterfactuals": tuple(np.concatenate(pair) for pair in zip(own, added, strict=True)),
                "with further images": further,
            }
            for name, data in rows.items():
                of_images, scores = tested(trained(data, classes, healthy, seed), test)
                right.setdefault((size, name), []).append(of_images)
                table.append({"images_per_class": size, "row": name, "seed": seed, **scores})
                LOG.info("%d images, seed %d, %s: accuracy %.3f", size, seed, name, scores["accuracy"])
    differences: list[dict[str, Any]] = []
    for size in map(int, images.split(",")):
        for one, other in (("with their counterfactuals", "images alone"),
                           ("with further images", "with their counterfactuals")):  # fmt: skip
            values = np.stack([np.mean(right[size, name], axis=0) for name in (other, one)], axis=1)
            a, b, interval = paired_difference(values, np.ones_like(values), [str(n) for n in range(len(values))])
            differences.append({"images_per_class": size, "row": one, "over": other, "accuracy": b, "other": a,
                                "difference": b - a, "interval": list(interval)})  # fmt: skip
    about = {
        "command": f"python experiments/downstream.py --images {images} --seeds {seeds}",
        "machine": f"{platform.machine()}, {threads} thread(s), no GPU",
        "versions": {key: version(key) for key in ("torch", "diffusers", "numpy")},
        "code_revision": code_revision(),
        "test_images": len(test[0]),
        "differences": differences,
        "table": table,
    }
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(about, indent=1) + "\n")
    shown = pd.DataFrame(table).groupby(["images_per_class", "row"], sort=False).mean().drop(columns="seed")
    click.echo(shown.round(3).to_string())
    click.echo(pd.DataFrame(differences).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
