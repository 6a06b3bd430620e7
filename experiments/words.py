"""Induce findings by words that training never combined: captions from data on phantoms with factors.

    python experiments/words.py [--work runs/words] [--start runs/demo/model] [--steps 1200] [--images 32]

Training has no mass on the left and no pneumothorax on the right, neither as first nor as second finding. Healthy
phantoms of an unseen seed are edited under prompts that ask for these and for trained combinations: as one text, and
composed of the class and of a finding on that side ("Mass AND finding on the left"). What a prompt adds is the
difference to the counterfactual under the healthy prompt from the same noise. A classifier that was trained on all
combinations says which finding the image shows on which side, and whether sex, view and age stayed what they were.
UNet and text encoder are trained from scratch; the autoencoder is the demo's.
"""

from __future__ import annotations

import csv
import json
import os
import platform
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import torch
from diffusers import AutoencoderKL
from induction import DARK, counterfactuals, share_on
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from diffva_ray.config.recipe import Recipe, load_recipe, make_recipe
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.factor_phantoms import MANIFEST, factor_phantom, factor_set
from diffva_ray.data.factors import Factors, sample_factors
from diffva_ray.data.places import SIDES
from diffva_ray.evaluate.drawing import INK, MUTED, png
from diffva_ray.generate.plan import Request
from diffva_ray.generate.run import Run, open_run
from diffva_ray.model.bundle import build, save
from diffva_ray.progress import LOG, set_up_logging
from diffva_ray.provenance import code_revision, version
from diffva_ray.storage.opening import open_store
from diffva_ray.train.checkpoint import Checkpoints
from diffva_ray.train.loop import train
from diffva_ray.workflows.execution import Execution
from diffva_ray.workflows.generate import generate_run

Image = NDArray[np.float32]
CLASSES = ("Normal", "Lung_Opacity", "Pneumothorax", "Mass")
FINDINGS = {"Lung_Opacity": "Lung Opacity", "Pneumothorax": "Pneumothorax", "Mass": "Mass"}
HELD_OUT = {("Mass", "left"), ("Pneumothorax", "right")}
BEFORE = {"Mass on the left": 0.40, "Pneumothorax on the right": 0.20}  # induction.py: right side, held-out captions
HEALTHY = "normal chest scan"
CAPTIONS = {
    "templates": ["{severity} {size} {finding} {place} {other}, {age} {sex}, {view}"],
    "dropout": 0.4, "bare": 0.15, "unnamed": 0.25, "synonyms": 0.0,
}  # fmt: skip
INDUCING = {
    "method": "sdedit", "scheduler": "ddim", "strength": 0.85, "guidance_scale": 4.0, "num_inference_steps": 20,
    "source_prompt": "", "negative_prompt": "", "smoothing": 0.0,
}  # fmt: skip
PLAIN = {f"{finding} on the {side}": (label, side) for label, finding in FINDINGS.items() for side in SIDES}
COMPOSED = {
    f"{finding} AND finding on the {side}": (label, side) for label, finding in FINDINGS.items() for side in SIDES
}
PROMPTS = [HEALTHY, *PLAIN, *COMPOSED]
HEADS = [*((label, side) for label in FINDINGS for side in SIDES), "F", "AP", "older"]  # each yes or no
OLD = 55  # years


def recipe_of(steps: int) -> Recipe:
    values = load_recipe("phantom").model_dump(mode="json")
    _, joint, _ = values["train"]["stages"]
    joint |= {"steps": steps, "classes": {"Normal": 2, **dict.fromkeys(FINDINGS, 2)}}
    values["train"] |= {"stages": [joint]}
    values["model"]["tokenizer_length"] = 56
    values["data"] |= {"captions": CAPTIONS, "prompts": {"Normal": "Normal chest scan", **FINDINGS}}
    values["generate"] |= INDUCING
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


def started(recipe: Recipe, autoencoder: Path, folder: Path) -> Recipe:
    """The recipe on a base of an untrained UNet, an untrained text encoder and a trained autoencoder."""
    if not (folder / "diffva.json").exists():
        bundle = build(recipe)
        bundle.vae = AutoencoderKL.from_pretrained(autoencoder, subfolder="vae")
        save(bundle, open_store(str(folder)), {})
    values = recipe.model_dump(mode="json")
    values["model"] |= {"base": str(folder), "vae": None, "unet": None, "text": None}
    return make_recipe(values)


def train_once(recipe: Recipe, data: str, model: Path, threads: int) -> None:
    """Train the model, or go on, unless it is complete."""
    keep = Checkpoints(model / ".train", 2)
    if not (model / "diffva.json").exists():
        provenance = {"data_kind": "phantoms"}
        train(
            recipe, data, str(model), fingerprint="words", provenance=provenance, report=keep, resume=keep.latest(),
            threads=threads,
        )  # fmt: skip


class FactorClassifier(nn.Module):
    """Logits [n, HEADS] of grey images [n, 64, 64]; a coarse grid of features keeps the sides apart."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((1, 16), (16, 32), (32, 48)):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(4, after), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48 * 16, len(HEADS)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        spread, mean = torch.std_mean(images, dim=(1, 2), keepdim=True)
        logits: torch.Tensor = self.layers(((images - mean) / spread)[:, None])
        return logits


def answers(factors: Factors) -> list[float]:
    """The truth for each of HEADS."""
    found = {(finding.label, finding.side) for finding in factors.findings}
    known = [head in found for head in HEADS[:-3]]
    return [float(yes) for yes in (*known, factors.sex == "F", factors.view == "AP", factors.age >= OLD)]


def classifier(seed: int, images: int, steps: int) -> tuple[FactorClassifier, dict[str, float]]:
    """Train the classifier on phantoms with all combinations; return it with its accuracy on other ones."""
    rng = np.random.default_rng(seed)
    factors = [sample_factors(CLASSES[n % len(CLASSES)], rng) for n in range(images + 400)]
    pixels = torch.from_numpy(np.stack([factor_phantom(f, n, seed).image for n, f in enumerate(factors)]))
    truth = torch.tensor([answers(f) for f in factors])
    torch.manual_seed(seed)
    network = FactorClassifier()
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in range(steps):
        rows = torch.randint(0, images, (64,))
        noisy = pixels[rows] + 0.02 * torch.randn(64, 1, 1) + 0.01 * torch.randn_like(pixels[rows])
        loss = functional.binary_cross_entropy_with_logits(network(noisy), truth[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.inference_mode():
        right = ((network(pixels[images:]) > 0) == (truth[images:] > 0.5)).float().mean(0)
    return network, {name(head): float(share) for head, share in zip(HEADS, right, strict=True)}


def name(head: Any) -> str:
    return head if isinstance(head, str) else f"{FINDINGS[head[0]]} {head[1]}"


def scores(run: Run, network: FactorClassifier) -> dict[str, dict[str, float]]:
    found, lungs, images = counterfactuals(run)
    names = sorted(images)
    said = {}
    with torch.inference_mode():
        for prompt in PROMPTS:
            said[prompt] = network(torch.from_numpy(np.stack([found[prompt][image] for image in names]))).numpy()
    rows = {}
    for prompt, (label, side) in {**PLAIN, **COMPOSED}.items():
        other = SIDES[1 - SIDES.index(side)]
        added = [found[prompt][image] - found[HEALTHY][image] for image in names]
        shares = [
            share_on(side, np.clip(-change if label == DARK else change, 0, None), lungs[image])
            for change, image in zip(added, names, strict=True)
        ]
        logits, before = said[prompt], said[HEALTHY]
        wanted = HEADS.index((label, side))
        of_side = [HEADS.index((one, side)) for one in FINDINGS]
        kept = (logits[:, -3:] > 0) == (before[:, -3:] > 0)
        rows[prompt] = {
            "held out": float((label, side) in HELD_OUT),
            "right side": float(np.mean(np.array(shares) > 0.5)),
            "right finding": float(np.mean(logits[:, of_side].argmax(1) == of_side.index(wanted))),
            "finding and side": float(np.mean(logits[:, :-3].argmax(1) == wanted)),
            "nothing on the other side": float(np.mean(logits[:, HEADS.index((label, other))] < 0)),
            **{f"{factor} kept": float(kept[:, n].mean()) for n, factor in enumerate(("sex", "view", "age"))},
        }
    return rows


def picture(run: Run, folder: Path) -> None:
    """Draw three images under the prompts of the held-out combinations and of trained ones."""
    found, _, images = counterfactuals(run)
    shown = ["image", HEALTHY, *(prompt for prompt in PROMPTS[1:] if not prompt.startswith("Lung"))]
    chosen = sorted(images)[:3]
    figure = Figure(figsize=(11.5, 4.1), facecolor="white", layout="constrained")
    panels = figure.subplots(len(chosen), len(shown))
    for row, image in enumerate(chosen):
        for column, prompt in enumerate(shown):
            pixels = images[image] if prompt == "image" else found[prompt][image]
            panels[row, column].imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="bicubic")
            panels[row, column].set_axis_off()
            if row == 0:
                held_out = {**PLAIN, **COMPOSED}.get(prompt) in HELD_OUT
                title = prompt.replace(" AND ", "\nAND ").replace(" on the ", "\non the ")
                panels[row, column].set_title(title, fontsize=7, color=INK if held_out else MUTED)
    (folder / "words.png").write_bytes(png(figure))


def made(folder: Path, count: int, seed: int, classes: tuple[str, ...]) -> Path:
    if not (folder / "phantoms.json").exists():
        for _ in factor_set(open_store(str(folder)), count, 64, seed, classes):
            pass
    return folder


@click.command()
@click.option("--work", default="runs/words", show_default=True, type=click.Path(path_type=Path))
@click.option("--start", default="runs/demo/model", show_default=True, type=click.Path(path_type=Path, exists=True))
@click.option("--steps", default=1200, show_default=True, help="Training steps of UNet and text encoder.")
@click.option("--images", default=32, show_default=True, help="Healthy test images.")
@click.option("--threads", default=1, show_default=True)
@click.option("--result", default="experiments/results/words.json", type=click.Path(path_type=Path))
@click.option("--pictures", default="docs/images", type=click.Path(path_type=Path))
def main(work: Path, start: Path, steps: int, images: int, threads: int, result: Path, pictures: Path) -> None:
    set_up_logging()
    torch.set_num_threads(threads)
    work = work.absolute()
    data, test = made(work / "train", 3000, 300, CLASSES), made(work / "test", images, 303, ("Normal",))
    recipe, told = started(recipe_of(steps), start.absolute(), work / "base"), manifest(data)
    train_once(recipe, told, work / "model", threads)
    LOG.info("edits of %d images under %d prompts", images, len(PROMPTS))
    request = Request(classes=("Normal",), sweep=(("prompt", tuple(PROMPTS)),))
    generate_run(recipe, str(test), str(work / "model"), str(work / "run"), request, Execution(executor="inline"))
    network, accuracy = classifier(901, 3000, 1200)
    run = open_run(str(work / "run"))
    rows = scores(run, network)
    about = {
        "command": f"python experiments/words.py --steps {steps} --images {images}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "versions": {key: version(key) for key in ("torch", "diffusers", "transformers")},
        "code_revision": code_revision(),
        "training_images": len(open_dataset(told).images),
        "held_out": sorted(" on the ".join(pair) for pair in HELD_OUT),
        "before": BEFORE,
        "settings": INDUCING,
        "captions": CAPTIONS,
        "classifier_accuracy": accuracy,
        "prompts": rows,
    }
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(about, indent=1))
    picture(run, pictures)
    click.echo(pd.DataFrame(rows).T.round(2).to_string())
    click.echo(f"classifier: {', '.join(f'{head} {share:.2f}' for head, share in accuracy.items())}")
    click.echo(f"right side in experiments/induction.py, held out: {BEFORE}; the aim is 0.95")


if __name__ == "__main__":
    main()
