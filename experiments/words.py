"""Induce findings at a named place that training never combined, on phantoms with factors: how far composition goes.

    make demo && python experiments/words.py [--steps 5000] [--seeds 0,1,2] [--images 32]

Training has no mass on the left and no pneumothorax on the right, neither as first nor as second finding. Healthy
phantoms of an unseen seed are edited under prompts that ask for these and for trained combinations, in two ways:

- *words*: method ``sdedit``, the network reads the place ("Mass on the left");
- *place*: method ``masked`` with ``masked.source=place``, the words for places choose the part of the lungs, and the
  network reads the rest ("Mass").

Training conditions: ``mirror`` (``train.mirror``), and ``plain``. The text encoder stays as it was initialised, because
on captions a small one collapses. The factor classifier (stage ``factors``) was trained on all combinations of other
phantoms; ``ceiling`` is what it says of phantoms that do have the finding. Sliders: brightness in the lungs under "mild
TO severe", and the probability of being older under "30 year old TO 80 year old", by weight.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import torch
from diffusers import AutoencoderKL
from induction import counterfactuals
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import spearmanr

from diffva_ray.config.recipe import Recipe, load_recipe, make_recipe
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.factor_phantoms import MANIFEST, factor_phantom, factor_set
from diffva_ray.data.factors import sample_factors
from diffva_ray.data.places import SIDES
from diffva_ray.evaluate.drawing import INK, MUTED, png
from diffva_ray.generate.plan import Request
from diffva_ray.generate.run import Run, open_run
from diffva_ray.metrics.factors import FOLDER, FactorClassifier, load_factors
from diffva_ray.model.bundle import build, save
from diffva_ray.progress import LOG, set_up_logging
from diffva_ray.provenance import code_revision, version
from diffva_ray.storage.opening import open_store
from diffva_ray.workflows.execution import Execution
from diffva_ray.workflows.generate import generate_run
from diffva_ray.workflows.train import train_model

Image = Images = NDArray[np.float32]  # [size, size], [n, size, size]
CLASSES = ("Normal", "Lung_Opacity", "Pneumothorax", "Mass")
FINDINGS = {"Lung_Opacity": "Lung Opacity", "Pneumothorax": "Pneumothorax", "Mass": "Mass"}
HELD_OUT = {("Mass", "left"), ("Pneumothorax", "right")}
CAPTIONS = {
    "templates": ["{severity} {size} {finding} {place} {other}, {age} {sex}, {view}"],
    "dropout": 0.4, "bare": 0.15, "unnamed": 0.25, "synonyms": 0.0,
}  # fmt: skip
PROMPTS = {f"{name} on the {side}": (label, side) for label, name in FINDINGS.items() for side in SIDES}
WEIGHTS = (0.1, 0.3, 0.5, 0.7, 0.9)
SLIDERS = {
    "severity": [f"mild Lung Opacity on the right TO severe Lung Opacity on the right :{w:g}" for w in WEIGHTS],
    "age": [f"Normal chest scan, 30 year old TO Normal chest scan, 80 year old :{w:g}" for w in WEIGHTS],
}
WAYS: dict[str, dict[str, Any]] = {
    "words": {"method": "sdedit", "strength": 0.85, "guidance_scale": 4.0},
    "place": {"method": "masked", "strength": 1.0, "guidance_scale": 8.0},
}
TOKENS = 56  # of the longest caption
OTHERS = ("sex", "view", "age")  # factors that no prompt of PROMPTS names


def recipe_of(base: Path, steps: int, seed: int, mirror: bool) -> Recipe:
    values = load_recipe("phantom").model_dump(mode="json")
    _, joint, _ = values["train"]["stages"]
    joint |= {"steps": steps, "train_text_encoder": False, "learning_rate": 2e-3,
              "classes": {"Normal": 1, **dict.fromkeys(FINDINGS, 4)}}  # fmt: skip
    values["train"] |= {"stages": [joint], "mirror": mirror}
    values["seed"] = seed
    values["model"] |= {"base": str(base), "vae": None, "unet": None, "text": None, "tokenizer_length": TOKENS}
    values["data"] |= {"captions": CAPTIONS, "prompts": {"Normal": "Normal chest scan", **FINDINGS}}
    values["generate"] |= {
        "scheduler": "ddim", "num_inference_steps": 20, "source_prompt": "", "negative_prompt": "", "smoothing": 0.0,
    }  # fmt: skip
    return make_recipe(values)


def manifest(data: Path) -> str:
    """Write the manifest without the held-out combinations."""
    rows = list(csv.DictReader((data / MANIFEST).open()))
    kept = [row for row in rows if not {(row["label"], row["side"]), (row["second"], row["second_side"])} & HELD_OUT]
    with open(data / "told.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(kept)
    return str(data / "told.csv")


def base_of(autoencoder: Path, folder: Path, seed: int) -> Path:
    """A base of an untrained UNet and text encoder that predicts velocity, and a trained autoencoder."""
    if not (folder / "diffva.json").exists():
        values = load_recipe("phantom").model_dump(mode="json")
        values["model"] |= {"tokenizer_length": TOKENS, "scheduler": {"prediction_type": "v_prediction"}}
        bundle = build(make_recipe({**values, "seed": seed}))
        bundle.vae = AutoencoderKL.from_pretrained(autoencoder, subfolder="vae")
        save(bundle, open_store(str(folder)), {})
    return folder


def made(folder: Path, count: int, seed: int, classes: tuple[str, ...]) -> Path:
    if not (folder / "phantoms.json").exists():
        for _ in factor_set(open_store(str(folder)), count, 64, seed, classes):
            pass
    return folder


def classifier(base: Path, work: Path) -> Path:
    """The factor classifier of all combinations, trained by the product's own stage on phantoms of another seed."""
    data, model = made(work / "all", 3000, 901, CLASSES) / MANIFEST, work / "classifier"
    values = load_recipe("phantom").model_dump(mode="json")
    values["model"] |= {"base": str(base), "vae": None, "unet": None, "text": None}
    values["data"]["prompts"] = {"Normal": "Normal chest scan", **FINDINGS}
    stage = {"name": "factors", "trains": "factors", "steps": 1200, "batch_size": 64, "learning_rate": 4e-3,
             "warmup_steps": 20, "schedule": "cosine"}  # fmt: skip
    values["train"] |= {"stages": [stage]}
    train_model(make_recipe(values), str(data), str(model), executor="inline")
    return model / FOLDER


def shown(factors: FactorClassifier, images: Images, label: str, side: str) -> dict[str, float]:
    """Share of images whose likeliest finding is this one on this side, and in which it is not on the other side."""
    logits = factors.probabilities(images)
    findings = [n for n, factor in enumerate(factors.factors) if factor.kind == "finding"]
    names = [(factors.factors[n].label, factors.factors[n].value) for n in findings]
    opposite = names.index((label, SIDES[1 - SIDES.index(side)]))
    return {
        "wanted": float(np.mean(logits[:, findings].argmax(1) == names.index((label, side)))),
        "none_opposite": float(np.mean(logits[:, findings[opposite]] < 0.5)),
    }


def rows_of(run: Run, factors: FactorClassifier, **about: Any) -> list[dict[str, Any]]:
    """For each prompt: whether the counterfactuals show the finding on its side, and keep the answers of the image."""
    found, _, images = counterfactuals(run)
    before = factors.probabilities(np.stack([images[image] for image in sorted(images)])) > 0.5
    rows = []
    for prompt, (label, side) in PROMPTS.items():
        made_ = np.stack([found[prompt][image] for image in sorted(images)])
        kept = ((factors.probabilities(made_) > 0.5) == before).mean(0)
        others = {factor.kind: kept[n] for n, factor in enumerate(factors.factors) if factor.kind != "finding"}
        rows.append(
            {**about, "prompt": prompt, "held_out": (label, side) in HELD_OUT, **shown(factors, made_, label, side),
             **{f"{kind}_kept": float(others[kind]) for kind in OTHERS}}
        )  # fmt: skip
    return rows


def ceiling(factors: FactorClassifier, count: int) -> list[dict[str, Any]]:
    """The same of phantoms that do have the finding: what the classifier would say of a perfect edit."""
    rows = []
    for prompt, (label, side) in PROMPTS.items():
        made_, rng, patient = list[Image](), np.random.default_rng(7), 0
        while len(made_) < count:
            drawn, patient = sample_factors(label, rng), patient + 1
            if len(drawn.findings) == 1 and drawn.findings[0].side == side:
                made_.append(factor_phantom(drawn, patient, 907).image)
        rows.append({"prompt": prompt, "n": count, **shown(factors, np.stack(made_), label, side)})
    return rows


def slider_rows(run: Run, factors: FactorClassifier, **about: Any) -> list[dict[str, Any]]:
    """Spearman's correlation of weight and response in each image, and its mean, for the sliders of a run: what a
    slider promises is 1."""
    found, lungs, images = counterfactuals(run)
    older = next(n for n, factor in enumerate(factors.factors) if factor.kind == "age")
    rows = []
    for name, prompts in SLIDERS.items():
        if prompts[0] not in found:
            continue
        of_images = []
        for image in sorted(images):
            made_ = np.stack([found[prompt][image] for prompt in prompts])
            if name == "age":
                response = factors.probabilities(made_)[:, older]
            else:
                response = np.array([one[lungs[image]].mean() for one in made_])
            of_images.append(spearmanr(WEIGHTS, response).statistic)
        rows.append({**about, "slider": name, "spearman": float(np.nanmean(of_images)), "n": len(of_images)})
    return rows


def picture(run: Run, folder: Path) -> None:
    """Draw three images and their counterfactuals; prompts of held-out combinations are black."""
    found, _, images = counterfactuals(run)
    figure = Figure(figsize=(9.2, 4.1), facecolor="white", layout="constrained")
    shown = ["image", *PROMPTS]
    panels = figure.subplots(3, len(shown))
    for row, image in enumerate(sorted(images)[:3]):
        for column, prompt in enumerate(shown):
            pixels = images[image] if prompt == "image" else found[prompt][image]
            panels[row, column].imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="bicubic")
            panels[row, column].set_axis_off()
            if row == 0:
                held_out = PROMPTS.get(prompt) in HELD_OUT
                title = prompt.replace(" on the ", "\non the ")
                panels[row, column].set_title(title, fontsize=8, color=INK if held_out else MUTED)
    (folder / "words.png").write_bytes(png(figure))


@click.command()
@click.option("--work", default="runs/words", show_default=True, type=click.Path(path_type=Path))
@click.option("--start", default="runs/demo/model", show_default=True, type=click.Path(path_type=Path, exists=True))
@click.option("--steps", default=5000, show_default=True, help="Training steps of the UNet.")
@click.option("--seeds", default="0,1,2", show_default=True, help="Training seeds of condition mirror.")
@click.option("--plain", default="0", show_default=True, help="Training seeds of condition plain.")
@click.option("--images", default=32, show_default=True, help="Healthy test images.")
@click.option("--threads", default=1, show_default=True)
@click.option("--result", default="experiments/results/words.json", type=click.Path(path_type=Path))
@click.option("--pictures", default="docs/images", type=click.Path(path_type=Path))
def main(
    work: Path, start: Path, steps: int, seeds: str, plain: str, images: int, threads: int, result: Path,
    pictures: Path,
) -> None:  # fmt: skip
    set_up_logging()
    torch.set_num_threads(threads)
    work = work.absolute()
    data, test = made(work / "train", 3000, 300, CLASSES), made(work / "test", images, 303, ("Normal",))
    told = manifest(data)
    of_condition = {"mirror": [int(s) for s in seeds.split(",") if s], "plain": [int(s) for s in plain.split(",") if s]}
    factors = classifier(base_of(start.absolute(), work / "base-0", 0), work)
    network = load_factors(open_store(str(factors.parent)))
    assert network is not None
    rows, sliders = list[dict[str, Any]](), list[dict[str, Any]]()
    for condition, numbers in of_condition.items():
        for seed in numbers:
            base = base_of(start.absolute(), work / f"base-{seed}", seed)
            recipe, model = recipe_of(base, steps, seed, condition == "mirror"), work / f"{condition}-{seed}"
            train_model(recipe, told, str(model), executor="inline")
            shutil.copytree(factors, model / FOLDER, dirs_exist_ok=True)
            for way, settings in WAYS.items():
                LOG.info("edits by %s of condition %s, seed %d", way, condition, seed)
                values = recipe.model_dump(mode="json")
                values["generate"] |= settings
                values["generate"]["masked"]["source"] = "place"
                prompts = tuple(PROMPTS)
                if way == "words":
                    prompts += tuple(prompt for of_slider in SLIDERS.values() for prompt in of_slider)
                out = f"{model}/{way}"
                request = Request(classes=("Normal",), sweep=(("prompt", prompts),))
                generate_run(make_recipe(values), str(test), str(model), out, request, Execution(executor="inline"))
                rows += rows_of(open_run(out), network, condition=condition, way=way, seed=seed)
                if way == "place":  # of the sliders, only severity has a place
                    out, prompts = f"{model}/sliders", tuple(SLIDERS["severity"])
                    request = Request(classes=("Normal",), sweep=(("prompt", prompts),))
                    generate_run(make_recipe(values), str(test), str(model), out, request, Execution(executor="inline"))
                sliders += slider_rows(open_run(out), network, condition=condition, way=way, seed=seed)
    about = {
        "command": f"python experiments/words.py --steps {steps} --seeds {seeds} --plain {plain} --images {images}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "versions": {key: version(key) for key in ("torch", "diffusers", "transformers")},
        "code_revision": code_revision(),
        "training_images": len(open_dataset(told).images),
        "test_images": images,
        "held_out": sorted(" on the ".join(pair) for pair in HELD_OUT),
        "ways": WAYS,
        "captions": CAPTIONS,
        "classifier": {factor.name: [factor.accuracy, factor.chance] for factor in network.factors},
        "of_phantoms_with_the_finding": ceiling(network, 64),
        "rows": rows,
        "sliders": sliders,
    }
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(about, indent=1))
    first = next(condition for condition, numbers in of_condition.items() if numbers)
    picture(open_run(str(work / f"{first}-{of_condition[first][0]}" / "place")), pictures)
    frame = pd.DataFrame(rows).drop(columns="seed")
    click.echo(frame.groupby(["condition", "way", "held_out", "prompt"], sort=False).mean().round(2).to_string())
    click.echo(pd.DataFrame(sliders).round(2).to_string(index=False))


if __name__ == "__main__":
    main()
