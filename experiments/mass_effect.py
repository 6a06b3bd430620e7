"""Mass effect: does a counterfactual put displaced anatomy back, or only take the mass away?

    python experiments/mass_effect.py --model NAME=FOLDER [--model ...] [--images 100]
    python experiments/mass_effect.py --train --work runs/mass_effect     # a model and the GANs, trained with masses
    python experiments/mass_effect.py --quick                             # under a minute: the controls alone

The paper's argument against its predecessors is that they remove a tumour and leave what it has displaced. A phantom
with a mass has the exact ground truth, and two controls that no real image has: the image whose mass was removed while
heart and vessels stay displaced, and the one whose anatomy was put back around the mass. The change is thus split into
*mass* (pixels that the mass covers) and *displaced* (pixels that only the push changed, outside the mass), and each
part is scored by the error left,

    sum |counterfactual - ground truth| / sum |image - ground truth|    over the pixels of the part and all images.

0 is the ground truth, 1 the untouched image. Above 1 the method has made it worse. ``--model`` takes any model folder
that was trained with class Mass; its own recipe's settings are used.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from diffva_ray.config.recipe import load_recipe
from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.data.lesions import LESIONS
from diffva_ray.data.phantoms import VISIBLE, exposed, phantom_set
from diffva_ray.data.thorax import Thorax, grid
from diffva_ray.metrics.intervals import paired_difference
from diffva_ray.model.bundle import load
from diffva_ray.progress import LOG, set_up_logging
from diffva_ray.provenance import code_revision, version
from diffva_ray.storage.opening import open_store
from diffva_ray.workflows.train import train_model

Image = NDArray[np.float32]
SEED = 7207  # of the test images
PARTS = ("mass", "displaced")


@dataclass(frozen=True)
class Displaced:
    """A phantom with a mass, and its controls; all [size, size] in [0, 1]."""

    image: Image
    truth: Image  # without the mass, with the anatomy in its place
    removed: Image  # control: without the mass, with the anatomy still displaced
    put_back: Image  # control: with the mass, with the anatomy in its place
    parts: dict[str, NDArray[np.bool_]]  # pixels of PARTS


def displaced(patient: int, seed: int = SEED, size: int = 64) -> Displaced:
    """Draw the four versions of one patient, who has the same noise in each."""
    anatomy, foreign, exposure, disease = np.random.SeedSequence([seed, patient]).spawn(4)
    thorax = Thorax.sample(np.random.default_rng(anatomy))
    mass = LESIONS["Mass"](np.random.default_rng(disease), thorax, *thorax.coordinates(*grid(size)))

    def drawn(lesion: Any) -> Any:
        return exposed(thorax, [lesion], "Mass", {}, foreign, exposure, size)

    whole, pushed = drawn(mass), drawn(replace(mass, opacity=np.zeros_like(mass.opacity)))
    covered = drawn(replace(mass, push=None))
    core = np.abs(covered.image - whole.ground_truth) > VISIBLE / 5
    only_pushed = (np.abs(pushed.image - whole.ground_truth) > VISIBLE / 2) & ~core
    return Displaced(
        whole.image, whole.ground_truth, pushed.image, covered.image, {"mass": core, "displaced": only_pushed}
    )


def errors(counterfactual: Image, patient: Displaced) -> dict[str, tuple[float, float]]:
    """Per part the error of a counterfactual, and that of the untouched image."""
    left, untouched = (np.abs(image - patient.truth) for image in (counterfactual, patient.image))
    return {part: (float(left[where].sum()), float(untouched[where].sum())) for part, where in patient.parts.items()}


def summary(counterfactuals: list[Image], patients: list[Displaced]) -> dict[str, Any]:
    """Error left by part, with 95 % intervals over the patients."""
    found: dict[str, Any] = {}
    table = [errors(one, patient) for one, patient in zip(counterfactuals, patients, strict=True)]
    for part in PARTS:
        left, untouched = np.array([row[part] for row in table]).T
        ratios = np.stack([np.zeros_like(left), left], axis=1)  # the difference to nothing left is the ratio itself
        _, ratio, interval = paired_difference(ratios, np.stack([untouched] * 2, axis=1), range(len(table)))
        found |= {f"{part}_left": ratio, f"{part}_interval": list(interval)}
    return found


def controls(patients: list[Displaced]) -> dict[str, dict[str, Any]]:
    """The rows whose values are known."""
    versions = {
        "the untouched image": "image",
        "the ground truth": "truth",
        "mass removed, anatomy displaced": "removed",
        "anatomy put back, mass kept": "put_back",
    }
    return {
        name: summary([getattr(patient, field) for patient in patients], patients) for name, field in versions.items()
    }


def made(model: str, patients: list[Displaced]) -> list[Image]:
    """The counterfactuals of a model, by its own recipe, on the model's grid, which has to be the phantoms'."""
    engine = CounterfactualEngine(load(model), device="cpu")
    size, images = engine.config.micro_batch, [patient.image for patient in patients]
    batches = (images[n : n + size] for n in range(0, len(images), size))
    return [
        one
        for number, batch in enumerate(batches)
        for one in engine(batch, [number * size + n for n in range(len(batch))]).counterfactuals
    ]


def trained(work: Path) -> dict[str, str]:
    """Our model and the GANs, trained on phantoms of which a quarter have a mass."""
    data = work / "train"
    if not (data / "phantoms.json").exists():
        for _ in phantom_set(open_store(str(data)), 3000, 64, 711, ("Normal", "Mass", "Lung_Opacity", "Normal")):
            pass
    ours = str(work / "ours")
    longer = ["train.stages.0.steps=1000", "train.stages.1.steps=3000", "train.stages.1.ema_decay=0.997"]
    train_model(load_recipe("phantom", longer), str(data), ours, executor="inline")
    models = {"ours": ours}
    for name in ("va-gan", "vant-gan", "ant-gan"):
        models[name] = str(work / name)
        recipe = load_recipe(name, [f"model.base={ours}", "train.stages.0.max_minutes=20"])
        train_model(recipe, str(data), models[name], executor="inline")
    return models


@click.command()
@click.option("--model", "models", multiple=True, metavar="NAME=FOLDER", help="A model to score; repeatable.")
@click.option("--train", is_flag=True, help="Train the models first, about an hour and a half of one core.")
@click.option("--work", default="runs/mass_effect", show_default=True, type=click.Path(path_type=Path))
@click.option("--images", "count", default=100, show_default=True)
@click.option("--quick", is_flag=True, help="Score the controls on 12 images; write nothing.")
@click.option("--result", default="experiments/results/mass_effect.json", type=click.Path(path_type=Path))
def main(models: tuple[str, ...], train: bool, work: Path, count: int, quick: bool, result: Path) -> None:
    set_up_logging()
    patients = [displaced(n) for n in range(12 if quick else count)]
    rows = controls(patients)
    named = {name: folder for name, _, folder in (model.partition("=") for model in models)}
    named |= trained(work.absolute()) if train else {}
    for name, folder in named.items():
        LOG.info("scoring %s", name)
        rows[name] = summary(made(folder, patients), patients)
    for name, row in rows.items():
        click.echo(f"{name:>34}: mass left {row['mass_left']:.3f}, displaced left {row['displaced_left']:.3f}")
    if quick or not named:
        return
    about = {
        "command": "python experiments/mass_effect.py" + (" --train" if train else ""),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "versions": {name: version(name) for name in ("torch", "diffusers")},
        "code_revision": code_revision(),
        "images": count,
        "rows": rows,
    }
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
