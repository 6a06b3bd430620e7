"""Score attribution maps on real images against radiologists' boxes, cross-validated by patient, with the small model.

    python experiments/real_pack.py --pack ../shared/data --base runs/demo/model --out runs/real-cv [--implants 1600]

Uses Lung_Opacity against Normal of one source (NIH), because class and source are confounded in the pack. Boxed images
are split into three folds by patient. For each test fold, settings are chosen on the next fold (validation), and the
model is trained on the rest and on unboxed images, none of whose patients is in either. With ``--implants`` training
also uses that many images derived from healthy images of the training fold, every second one with a phantom opacity;
the model sees only their class. All competitors are tuned alike: every map's smoothing, occlusion's window, our
strength and guidance are chosen by AUROC on the validation fold. Scores use the whole image, because the pack has no
lung masks for these classes. Intervals: bootstrap over patients.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import torch
from gradients import ImageClassifier, grad_cam, integrated_gradients, occlusion
from numpy.typing import NDArray

from diffva_ray.config.recipe import Recipe, load_recipe, make_recipe
from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.counterfactual.latent_diffusion import LatentDiffusion
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.images import decode, to_square
from diffva_ray.data.implants import Source, implant_set
from diffva_ray.evaluate.records import image_truth
from diffva_ray.evaluate.scores import score_image
from diffva_ray.metrics.baselines import centre_prior
from diffva_ray.metrics.intervals import group_bootstrap
from diffva_ray.metrics.localization import dice_at, fixed_threshold, smooth
from diffva_ray.model.bundle import load
from diffva_ray.progress import LOG, set_up_logging
from diffva_ray.provenance import code_revision
from diffva_ray.storage.opening import open_store
from diffva_ray.workflows.train import train_model

FOLDS = 3
EDITS = tuple(itertools.product((0.45, 0.6, 0.75), (1.5, 3.0)))  # strength, guidance scale
SMOOTHINGS = (0.0, 0.024, 0.05, 0.1)
WINDOWS = (1 / 8, 1 / 4, 3 / 8)  # of occlusion, as a fraction of the width
METRICS = ("auroc", "auprc", "dice_fixed", "pointing_game")
CLASSIFIER = {"name": "classifier", "trains": "classifier", "steps": 500, "batch_size": 32, "learning_rate": 2.0e-3,
              "warmup_steps": 20, "schedule": "cosine", "ema_decay": 0.98,
              "classes": {"Normal": 1, "Lung_Opacity": 1}}  # fmt: skip
Maps = NDArray[np.float32]  # [n, size, size]


def images_of(pack: Path) -> pd.DataFrame:
    """Return the images of source NIH with columns path (absolute), label, patient, boxed."""
    boxed = set(pd.read_csv(pack / "boxes.csv")["file"])
    parts = []
    for folder in (pack, pack / "train_extra"):
        table = pd.read_csv(folder / "manifest.csv")
        table = table[(table["kind"] == "image") & table["patient"].fillna("").str.startswith("NIH")]
        table = table[table["class"].isin(["Normal", "Lung_Opacity"])]
        parts.append(
            pd.DataFrame(
                {
                    "path": [str(folder / file) for file in table["file"]],
                    "label": table["class"],
                    "patient": table["patient"],
                    "boxed": [folder == pack and file in boxed for file in table["file"]],
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def write_fold(images: pd.DataFrame, folder: Path, boxes: pd.DataFrame) -> None:
    """Write a Radiography folder of the images, with boxes where they exist, and their patients."""
    rows, patients = [], {}
    for n, image in enumerate(images.itertuples()):
        name = f"{image.label}/images/{n:04d}-{Path(image.path).name}"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(Path(image.path).read_bytes())
        patients[name] = image.patient
        if image.boxed:
            of_image = boxes[[image.path.endswith("/" + file) for file in boxes["file"]]]
            rows += [f"{name},{box.x},{box.y},{box.w},{box.h}" for box in of_image.itertuples()]
    (folder / "boxes.csv").write_text("\n".join(["file,x,y,w,h", *rows]) + "\n")
    (folder / "patients.json").write_text(json.dumps(patients))


def with_implants(place: Path, count: int, size: int, seed: int) -> str:
    """Write a manifest of the fold's images and ``count`` images of its healthy hosts, half of them with an opacity.

    Hosts without an opacity are processed in the same way, so that only the opacity differs.
    """
    dataset, target = open_dataset(str(place / "train")), place / "implants"
    if not (target / "implants.json").exists():
        for _ in implant_set(
            open_store(str(target)), dataset, "Normal", count, size, Source(seed), ("Normal", "Lung_Opacity")
        ):
            pass
    rows = [(f"train/{image.path}", image.label) for image in dataset.images]
    rows += [(str(path.relative_to(place)), path.parts[-3]) for path in sorted(target.glob("*/images/*.png"))]
    pd.DataFrame(rows, columns=["path", "label"]).to_csv(place / "train.csv", index=False)
    return str(place / "train.csv")


class Fold:
    """The boxed images of a fold: pixels, truth and patients."""

    def __init__(self, folder: Path, size: int) -> None:
        dataset, self.patients = open_dataset(str(folder)), json.loads((folder / "patients.json").read_text())
        self.images = [image for image in dataset.images if image.path in dataset.shapes]
        read = [decode(dataset.store.read(image.path)) for image in self.images]
        self.pixels = np.stack([to_square(image, size) for image in read])
        self.truth = [
            image_truth(dataset.store, image, dataset.shapes, pixels.shape[1], pixels.shape[0], size)
            for image, pixels in zip(self.images, read, strict=True)
        ]

    def scores(self, maps: Maps) -> pd.DataFrame:
        """Return one row per image, with its patient."""
        rows = []
        for image, truth, saliency in zip(self.images, self.truth, maps, strict=True):
            rows += [{**row, "patient": self.patients[image.path]} for row in score_image({"map": saliency}, truth)]
        return pd.DataFrame(rows)


def competitors(model: str, fold: Fold, recipe: Recipe) -> Iterator[tuple[str, dict[str, Any], Maps]]:
    """Return every map of every setting: its row, its setting, and the map before smoothing."""
    engine = CounterfactualEngine(load(model), recipe.generate, "cpu")
    batch = recipe.generate.micro_batch
    for strength, guidance in EDITS:
        engine.config = recipe.generate.model_copy(update={"strength": strength, "guidance_scale": guidance})
        made = [
            engine(list(some), list(range(start, start + len(some))))
            for start in range(0, len(fold.pixels), batch)
            for some in [fold.pixels[start : start + batch]]
        ]
        signed = np.concatenate([one.reconstructions - one.counterfactuals for one in made])
        yield "positive", {"strength": strength, "guidance_scale": guidance}, np.maximum(signed, 0)
        yield "absolute", {"strength": strength, "guidance_scale": guidance}, np.abs(signed)
    classifier = ImageClassifier(LatentDiffusion(load(model)))
    yield "Grad-CAM", {}, np.maximum(grad_cam(classifier, fold.pixels), 0)
    yield "integrated gradients", {}, np.maximum(integrated_gradients(classifier, fold.pixels), 0)
    for window in WINDOWS:
        found = occlusion(classifier, fold.pixels, window=window, stride=window / 2)
        yield "occlusion", {"window": window}, np.maximum(found, 0)
    yield "brightness", {}, fold.pixels
    prior = centre_prior(fold.pixels.shape[1])
    yield "centre prior", {}, np.broadcast_to(prior, fold.pixels.shape)


def smoothed(maps: Maps, fraction: float) -> Maps:
    return np.stack([smooth(one, fraction) for one in maps])


def tuned(model: str, validation: Fold, test: Fold, recipe: Recipe) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return test scores of every competitor with the setting that the validation fold chose, and this choice.

    The threshold comes from the validation fold, too.
    """
    best: dict[str, tuple[float, dict[str, Any], float, float]] = {}
    for name, setting, maps in competitors(model, validation, recipe):
        for fraction in SMOOTHINGS:
            rows = validation.scores(smoothed(maps, fraction))
            value = float(rows["auroc"].mean())
            if name not in best or value > best[name][0]:
                best[name] = value, setting, fraction, fixed_threshold(np.stack(rows["dice_curve"].to_list()))[0]
    found = []
    for name, setting, maps in competitors(model, test, recipe):
        value, chosen, fraction, threshold = best[name]
        if setting == chosen:
            rows = test.scores(smoothed(maps, fraction)).assign(map=name)
            rows["dice_fixed"] = dice_at(np.stack(rows["dice_curve"].to_list()), threshold)
            found.append(rows.drop(columns="dice_curve"))
    kept = {
        name: {**setting, "smoothing": f, "validation_auroc": round(v, 3)} for name, (v, setting, f, _) in best.items()
    }
    return pd.concat(found), kept


def recipe_of(base: str, autoencoder_steps: int, steps: int, seed: int) -> Recipe:
    classes = [f"train.stages.{n}.classes={{Normal: 1, Lung_Opacity: 1}}" for n in (1, 2)]
    values = load_recipe("cpu", [f"model.base={Path(base).resolve()}", *classes]).model_dump(mode="json")
    values["seed"] = seed
    stages = values["train"]["stages"]
    stages[0]["steps"], stages[1]["steps"] = autoencoder_steps, steps
    values["train"]["stages"] = [*stages, CLASSIFIER]
    return make_recipe(values)


@click.command()
@click.option("--pack", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--base", default="runs/demo/model", show_default=True)
@click.option("--out", default="runs/real-cv", show_default=True)
@click.option(
    "--implants", default=1600, show_default=True, help="Images derived from healthy ones; 0: real images only."
)
@click.option("--autoencoder-steps", default=300, show_default=True)
@click.option("--steps", default=1500, show_default=True, help="Training steps of UNet and text encoder.")
@click.option("--threads", default=1, show_default=True)
@click.option(
    "--result", default="experiments/results/real_pack.json", show_default=True, type=click.Path(path_type=Path)
)
def main(
    pack: Path, base: str, out: str, implants: int, autoencoder_steps: int, steps: int, threads: int, result: Path
) -> None:
    set_up_logging()
    torch.set_num_threads(threads)
    began = time.monotonic()
    pack = pack.resolve()
    images, boxes = images_of(pack), pd.read_csv(pack / "boxes.csv")
    patients = sorted(images[images["boxed"]]["patient"].unique())
    np.random.default_rng(0).shuffle(patients)
    fold_of = {patient: n % FOLDS for n, patient in enumerate(patients)}
    images["fold"] = images["patient"].map(fold_of).fillna(-1).astype(int)
    rows, chosen = [], []
    for number in range(FOLDS):
        place, recipe = Path(out).absolute() / f"fold-{number}", recipe_of(base, autoencoder_steps, steps, number)
        size, validation_fold = recipe.model.resolution, (number + 1) % FOLDS
        sets = {
            "test": images[images["boxed"] & (images["fold"] == number)],
            "validation": images[images["boxed"] & (images["fold"] == validation_fold)],
            "train": images[~images["fold"].isin([number, validation_fold])],
        }
        for name, of_set in sets.items():
            if not (place / name).exists():
                write_fold(of_set, place / name, boxes)
        data = with_implants(place, implants, size, number) if implants else str(place / "train")
        train_model(recipe, data, str(place / "model"), executor="inline")
        validation, test = (Fold(place / name, size) for name in ("validation", "test"))
        found, kept = tuned(str(place / "model"), validation, test, recipe)
        LOG.info("fold %d: %s", number, found.groupby("map")[["auroc", "auprc"]].mean().round(3).to_dict("index"))
        rows.append(found)
        chosen.append(kept)
    table = summary(pd.concat(rows))
    about = {
        "command": f"python experiments/real_pack.py --pack PACK --base MODEL --implants {implants} "
        f"--autoencoder-steps {autoencoder_steps} --steps {steps}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "base_digest": load(base).digest,
        "training_images": len(images[~images["fold"].isin([0, 1])]) + implants,
        "code_revision": code_revision(),
        "seconds": round(time.monotonic() - began),
        "boxed_images": int(images["boxed"].sum()),
        "patients": len(patients),
        "chosen_on_validation": chosen,
        "table": table,
    }
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(about, indent=1))
    click.echo(pd.DataFrame(table).to_string(index=False))


def summary(rows: pd.DataFrame) -> list[dict[str, object]]:
    """Return the mean over all test images with a patient-bootstrap interval, for each map."""
    table = []
    for name, metric in itertools.product(rows["map"].unique(), METRICS):
        of_map = rows[rows["map"] == name]
        low, high = group_bootstrap(of_map[metric].to_numpy(), of_map["patient"].tolist())
        mean = float(of_map[metric].mean())
        table.append({"map": name, "metric": metric, "n": len(of_map), "mean": round(mean, 3),
                      "low": round(low, 3), "high": round(high, 3)})  # fmt: skip
    return table


if __name__ == "__main__":
    main()
