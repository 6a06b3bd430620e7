"""Score attribution maps on real images against radiologists' boxes, beside competitors tuned as hard.

    python experiments/real_images.py --model small --data ../shared/data/real

The images of ``develop`` are split in halves by patient. On one half, every map's setting, sign, smoothing, threshold,
and its blend with the prior are chosen, by AUPRC; the other half is reported, and the halves swap. The learned prior is
the mean of the lesion masks of the half on which is chosen. The truth of an image is the union of all its boxes and
masks; the grid has 64 pixels. The headline leaves cardiomegaly out: its box is the heart, always at the same place.
Intervals: studentised bootstrap over patients.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from real_rivals import Maps, rivals
from real_table import SIZE, Candidate, Images, Table, candidates, normals, on_grid, read

from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.images import decode, decode_mask
from diffva_ray.data.implants import Source, implant_set
from diffva_ray.metrics.localization import positive, score, smooth
from diffva_ray.metrics.ssim import psnr
from diffva_ray.model.bundle import load
from diffva_ray.model.card import file_sha256
from diffva_ray.model.packaged import model_address
from diffva_ray.progress import LOG, set_up_logging
from diffva_ray.provenance import code_revision
from diffva_ray.storage.local import LocalStore
from diffva_ray.storage.opening import open_store


def counterfactuals(engine: CounterfactualEngine, images: Maps, changes: dict[str, Any]) -> Maps:
    """Counterfactuals of one setting."""
    engine.config = engine.bundle.recipe.generate.model_copy(update=changes)
    size, parts = engine.config.micro_batch, []
    for start in range(0, len(images), size):
        some = list(images[start : start + size])
        parts.append(engine(some, list(range(start, start + len(some)))).counterfactuals)
    return np.concatenate(parts)


def generated(engine: CounterfactualEngine, images: Maps, changes: dict[str, Any]) -> Maps:
    """Signed maps of one setting on the scoring grid. The method's reconstruction is the image itself."""
    return on_grid(images - counterfactuals(engine, images, changes))


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
EDIT = {"method": "instruct-pix2pix", "scheduler": "ddim", "strength": 1.0, "negative_prompt": ""}
SETTINGS = ((1, 1.0), (2, 1.0), (1, 2.0))  # steps, guidance


def ours(engine: CounterfactualEngine, images: Maps) -> list[tuple[str, Maps]]:
    """Return setting and maps of each setting that may be chosen: of the image, and with its mirror image's."""
    every: list[tuple[str, Maps]] = []
    for steps, guidance in SETTINGS:
        changes = {**EDIT, "num_inference_steps": steps, "guidance_scale": guidance}
        name = f"{steps} steps, guidance {guidance:g}"
        LOG.info("generating with %s", name)
        plain = generated(engine, images, changes)
        every.append((name, plain))
        if steps == 1 and guidance == 1:
            mirrored = generated(engine, np.ascontiguousarray(images[:, :, ::-1]), changes)[:, :, ::-1]
            every.append((f"{name}, mean with the mirrored image's", (plain + mirrored) / 2))
    return [*every, ("mean of all settings", np.mean([maps for _, maps in every], axis=0, dtype=np.float32))]


def on_implants(engine: CounterfactualEngine, data: str, sizes: int, changes: dict[str, Any]) -> list[dict[str, Any]]:
    """Scores on findings drawn into the normal images of ``develop``, whose ground truth is known, by finding."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        dataset, store = open_dataset(f"{data}/develop"), LocalStore(folder)
        for label in ("Lung_Opacity", "Effusion", "Mass", "Pneumothorax"):
            paths = list(implant_set(store, dataset, "Normal", sizes, engine.size, Source(9001), (label,)))
            kinds = [[path.replace("/images/", f"/{kind}/") for path in paths] for kind in ("images", "ground_truth")]
            images, truth = (np.stack([decode(store.read(path)) for path in of]) for of in kinds)
            lesion = np.stack(
                [decode_mask(store.read(path.replace("/images/", "/lesions/")), engine.size) for path in paths]
            )
            after = counterfactuals(engine, images, changes)
            error, untouched = np.abs(after - truth), np.abs(images - truth)
            signed = images - after if label != "Pneumothorax" else after - images
            found = [score(positive(smooth(one, 0.03)), mask) for one, mask in zip(signed, lesion, strict=True)]
            rows.append(
                {
                    "finding": label,
                    "images": len(images),
                    "psnr": float(np.mean([psnr(a, b) for a, b in zip(after, truth, strict=True)])),
                    "psnr_untouched": float(np.mean([psnr(a, b) for a, b in zip(images, truth, strict=True)])),
                    "nearer_than_untouched": float(((error**2).mean((1, 2)) < (untouched**2).mean((1, 2))).mean()),
                    "lesion_error_left": float(
                        np.sum([e[m].mean() for e, m in zip(error, lesion, strict=True)])
                        / np.sum([e[m].mean() for e, m in zip(untouched, lesion, strict=True)])
                    ),
                    "auroc": float(np.mean([one.auroc for one in found if one])),
                    "auprc": float(np.mean([one.auprc for one in found if one])),
                }
            )
    return rows


def add_model(table: Table, name: str, model: str, images: Images, data: str) -> dict[str, Any]:
    """Add the rows of one model; return its scores on implants."""
    engine = CounterfactualEngine(load(model_address(model)), device="cpu")
    made = ours(engine, images.large)
    options = candidates(made, ("positive", "absolute"))
    table.add_chosen(name, options)
    order = np.roll(np.arange(len(images.half)), len(images.half) // 3)
    table.add_chosen(f"{name}, shuffled", [Candidate(option.setting, option.maps[order]) for option in options])
    table.add_chosen(f"{name}, negative part", candidates(made, ("negative",)), with_prior=False)
    for setting, maps in made:
        table.add_chosen(f"{name}: {setting}", candidates([(setting, maps)], ("positive", "absolute")), False)
    changes = {**EDIT, "num_inference_steps": 1, "guidance_scale": 1.0}
    best = best_rival(table)
    return {
        "digest": engine.bundle.digest,
        "unet_sha256": file_sha256(open_store(model_address(model)).local_folder() / WEIGHTS),
        "own_minus_shuffled": table.difference(f"{name}, shuffled", name, table.counted),
        "x_prior_minus_best_rival_x_prior": table.difference(best, f"{name} x prior", table.counted),
        "best_rival": best,
        "implants": on_implants(engine, data, 100, changes),
    }


def best_rival(table: Table) -> str:
    competitors = "brightness", "centre prior", "asymmetry", "PCA residual", "nearest normals"
    names = [f"{name} x prior" for name in competitors]
    return max(names, key=lambda name: float(table.rows[name]["auprc"][table.counted].mean()))


@click.command()
@click.option("--model", "models", multiple=True, default=("small=small",), show_default=True, metavar="NAME=MODEL")
@click.option("--data", required=True, type=click.Path(exists=True, file_okay=False))
@click.option("--out", default="experiments/results/real_images.json", show_default=True)
def main(models: tuple[str, ...], data: str, out: str) -> None:
    """Write the table of attribution maps on real images."""
    set_up_logging()
    started = time.time()
    images = read(f"{data}/develop", SIZE)
    pool = normals(f"{data}/train", 1500)
    table = Table(images)
    table.add("learned prior", [("", np.repeat(prior[None], len(images.half), 0)) for prior in table.priors])
    by_name: dict[str, list[tuple[str, Maps]]] = {}
    for name, setting, maps in rivals(images.small, pool):
        by_name.setdefault(name, []).append((setting, maps))
    for name, settings in by_name.items():
        signs = ("positive",) if name in ("brightness", "centre prior") else ("positive", "absolute")
        table.add_chosen(name, candidates(settings, signs))
    named = [model.partition("=")[::2] for model in models]
    about = {name: add_model(table, name, model, images, data) for name, model in named}
    result = {
        "experiment": "real images",
        "command": f"python experiments/real_images.py {' '.join(f'--model {name}=...' for name, _ in named)}",
        "code": code_revision(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seconds": round(time.time() - started),
        "images": int(table.counted.sum()),
        "patients": len(set(images.patient[table.counted])),
        "reference": "learned prior",
        "rows": table.summary("learned prior"),
        "models": about,
    }
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
