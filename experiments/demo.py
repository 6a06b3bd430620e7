"""Collect the results of a finished demo for the table of README.md and docs/index.md.

    make demo && python experiments/demo.py [--demo runs/demo]

The numbers are read from the runs' tables/metrics.json. Computed here is the strongest competitor without a network:
the image minus its projection on the principal components of the training set's normal images. Its number of
components, sign, smoothing and threshold are chosen on the validation images, by AUROC.
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from real_rivals import pca_residual

from diffva_ray.data.dataset import Dataset
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.images import decode_square
from diffva_ray.evaluate.records import Truth, image_truth, reduced_metrics
from diffva_ray.evaluate.scores import score_image
from diffva_ray.evaluate.tables import overall
from diffva_ray.generate.run import open_run
from diffva_ray.metrics.intervals import group_bootstrap
from diffva_ray.metrics.localization import BASELINES, SALIENCY, dice_at, fixed_threshold, smooth
from diffva_ray.provenance import version

COMPONENTS, SMOOTHINGS = (10, 20, 40, 80, 160), (0.0, 0.012, 0.024, 0.05)


def row_of(metrics: dict[str, Any], name: str, map_name: str, judged: bool) -> dict[str, Any]:
    """Return one row: localization of the map ``map_name``, and with ``judged`` the flip rate and lesion error."""
    rows = [row for row in metrics["localization"] if row["map"] == map_name]
    total = overall(rows) or {}
    row = {"row": name, "auroc": total["auroc"], "auroc_interval": total["auroc_interval"],
           "auroc_by_class": {one["label"]: one["auroc"] for one in rows if one is not total},
           "dice_fixed": total["dice_fixed"]}  # fmt: skip
    if judged:
        row["flip_rate"] = (overall(metrics["validity"]) or {})["flip_rate"]
        truth = overall(metrics["ground_truth"]) or {}
        row |= {"lesion_error_left": truth["lesion_error_ratio"], "psnr": truth["psnr"]}
    return row


def controls(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the untouched image and of the ground truth: floor and ceiling of a counterfactual."""
    validity, truth = (overall(metrics[table]) or {} for table in ("validity", "ground_truth"))
    return [
        {"row": "the untouched image", "flip_rate": validity["called_healthy_before"], "lesion_error_left": 1.0,
         "psnr": truth["psnr_input"]},
        {"row": "the autoencoder alone", "flip_rate": validity.get("flip_rate_reconstruction"),
         "psnr": truth["psnr_reconstruction"]},
        {"row": "the ground truth", "flip_rate": validity.get("flip_rate_ground_truth"), "lesion_error_left": 0.0},
    ]  # fmt: skip


def abnormal(dataset: Dataset, size: int) -> tuple[NDArray[np.float32], list[Truth], list[str]]:
    """Return the abnormal images [n, size, size], their truth and class."""
    images = [image for image in dataset.images if image.lesion_mask]
    pixels = np.stack([decode_square(dataset.store.read(image.path), size)[0] for image in images])
    truth = [image_truth(dataset.store, image, {}, size, size, size) for image in images]
    return pixels, truth, [image.label for image in images]


def pca_row(demo: str, size: int) -> dict[str, Any]:
    """Return the row of the PCA residual."""
    train, validation, test = (open_dataset(f"{demo}/data/{part}") for part in ("train", "validation", "test"))
    healthy = [image for image in train.images if image.label == "Normal"]
    normals = np.stack([decode_square(train.store.read(image.path), size)[0] for image in healthy])

    def scored(part: Dataset, components: int) -> dict[tuple[str, float], tuple[list[dict[str, Any]], list[str]]]:
        pixels, truth, labels = abnormal(part, size)
        residuals = pca_residual(pixels, normals, components)
        found: dict[tuple[str, float], tuple[list[dict[str, Any]], list[str]]] = {}
        for fraction in SMOOTHINGS:
            for sign, transform in SALIENCY.items():
                maps = [{"pca": transform(smooth(one, fraction))} for one in residuals]
                rows = [score_image(one, true) for one, true in zip(maps, truth, strict=True)]
                found[sign, fraction] = [row[0] for row in rows if row], [x for x, row in zip(labels, rows) if row]
        return found

    on_validation = {
        (components, *key): rows
        for components in COMPONENTS
        for key, (rows, _) in scored(validation, components).items()
    }
    best = max(on_validation, key=lambda key: float(np.mean([row["auroc"] for row in on_validation[key]])))
    threshold = fixed_threshold(np.stack([row["dice_curve"] for row in on_validation[best]]))[0]
    rows, labels = scored(test, best[0])[best[1], best[2]]
    auroc = np.array([row["auroc"] for row in rows])
    return {
        "row": "baseline: PCA residual of normal images",
        "auroc": float(auroc.mean()),
        "auroc_interval": list(group_bootstrap(auroc, list(range(len(auroc))))),
        "auroc_by_class": {name: float(auroc[[x == name for x in labels]].mean()) for name in sorted(set(labels))},
        "dice_fixed": float(dice_at(np.stack([row["dice_curve"] for row in rows]), threshold).mean()),
        "chosen": {"components": best[0], "sign": best[1], "smoothing": best[2]},
    }


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
    rows += controls(ours)
    rows.append(pca_row(demo, run.recipe.model.resolution))
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
