"""Leaderboard: every method and every attribution map on the same unseen phantoms, over several training seeds.

    python experiments/attribution.py [--work runs/attribution] [--seeds 0,1,2] [--images 300] [--recipe phantom]

Each training seed has its own model, classifier of noisy latents, ControlNet, GANs and judge, trained on 4000 phantoms
of its own seed. Thresholds come from validation images, scores from unseen test images; the judge never guides. Every
score uses the positive part of the map, smoothed by the recipe's Gaussian, inside the lungs. Rows called *sanity* must
fall to the level of the baselines. Finished parts below --work are kept.
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import torch
from conformal import attributed, conformal_threshold
from gradients import BASELINES, ImageClassifier
from matplotlib.figure import Figure

from diffva_ray.config.methods import METHODS as KNOWN
from diffva_ray.config.recipe import Recipe, load_recipe, make_recipe
from diffva_ray.counterfactual.latent_diffusion import LatentDiffusion
from diffva_ray.data.images import decode_map
from diffva_ray.data.phantoms import phantom_set
from diffva_ray.evaluate.drawing import DIVERGING, INK, outline, png
from diffva_ray.evaluate.options import Options
from diffva_ray.evaluate.records import as_records, by_shard, read_images, read_records, read_truth
from diffva_ray.evaluate.scores import score_image
from diffva_ray.generate.cost import calls
from diffva_ray.generate.plan import Request
from diffva_ray.generate.run import Run, open_run
from diffva_ray.metrics.baselines import BASELINES as TRIVIAL
from diffva_ray.metrics.localization import positive, smooth
from diffva_ray.model.bundle import build, load, save
from diffva_ray.progress import LOG, set_up_logging
from diffva_ray.provenance import code_revision, version
from diffva_ray.storage.opening import open_store
from diffva_ray.workflows.execution import Execution
from diffva_ray.workflows.generate import generate_run
from diffva_ray.workflows.reduce import reduce
from diffva_ray.workflows.status import read_status
from diffva_ray.workflows.train import train_model

TRAINING_IMAGES = 4000
SEEDS = {"train": 100, "validation": 101, "test": 103}  # seeds of the phantoms; different from the demo's
PAPER = {"method": "sdedit", "scheduler": "pndm", "strength": 0.55, "guidance_scale": 4.0, "num_inference_steps": 75,
         "difference": "raw", "smoothing": 0.0, "source_prompt": "", "negative_prompt": ""}  # fmt: skip
NOISED = {"strength": 0.55, "guidance_scale": 4.0, "num_inference_steps": 30, "source_prompt": "",
          "negative_prompt": ""}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "sdedit, the paper's settings": PAPER,
    "sdedit": {"method": "sdedit", **NOISED},
    "controlnet": {"method": "controlnet", **NOISED},
    "cycle": {"method": "cycle"},
    "classifier-guided": {"method": "classifier-guided", "source_prompt": "", "num_inference_steps": 17},
    "vant-gan": {"method": "vant-gan", "source_prompt": "", "negative_prompt": ""},
    "ant-gan": {"method": "ant-gan", "source_prompt": "", "negative_prompt": ""},
    "ddim-inversion, empty source": {"source_prompt": "", "negative_prompt": ""},
    "ddim-inversion": {"num_inference_steps": 17},
    "masked": {"method": "masked", "num_inference_steps": 17},
}
CLASSIFIER = {"name": "classifier", "trains": "classifier", "steps": 900, "batch_size": 32, "learning_rate": 2.0e-3,
              "warmup_steps": 20, "schedule": "cosine", "ema_decay": 0.98,
              "classes": {"Normal": 3, "Lung_Opacity": 1, "COVID": 1, "Viral Pneumonia": 1}}  # fmt: skip
CONTROLNET = {"name": "controlnet", "trains": "controlnet", "steps": 400, "batch_size": 16, "learning_rate": 1.0e-3,
              "warmup_steps": 20, "schedule": "cosine", "prompt_dropout": 0.1}  # fmt: skip
VANT_GAN = {"name": "vant-gan", "trains": "vant-gan", "steps": 700, "batch_size": 8, "learning_rate": 1.0e-3,
            "warmup_steps": 20, "schedule": "cosine", "ema_decay": 0.98, "block_out_channels": [8, 16, 32],
            "norm_num_groups": 4, "map_weight": 20}  # fmt: skip
ANT_GAN = {"name": "ant-gan", "trains": "ant-gan", "steps": 400, "batch_size": 8, "learning_rate": 1.0e-3,
           "warmup_steps": 20, "schedule": "cosine", "ema_decay": 0.98, "block_out_channels": [8, 16, 32],
           "norm_num_groups": 4}  # fmt: skip
EXTRAS = (CLASSIFIER, CONTROLNET, VANT_GAN, ANT_GAN)
SCALE = 0.35  # grey level at which the colours of the maps saturate
SCORES = ("auroc", "auprc", "dice_best", "dice_fixed", "pointing_game", "energy_in_truth")


def images(work: Path, split: str, seed: int, count: int, size: int) -> str:
    folder = work / f"{split}-{seed}"
    if not (folder / "phantoms.json").exists():
        for _ in phantom_set(open_store(str(folder)), count, size, 1000 * seed + SEEDS[split]):
            pass
    return str(folder)


def trained(work: Path, recipe: Recipe, data: str, name: str, seed: int, extras: tuple[dict[str, Any], ...]) -> str:
    model = str(work / f"{name}-{seed}")
    values = recipe.model_dump(mode="json")
    values["seed"] = seed
    values["train"]["stages"] += extras
    train_model(make_recipe(values), data, model, executor="inline")
    return model


def permuted(data: str, seed: int) -> str:
    """Write a manifest of the same images with shuffled labels; return its path."""
    root = Path(data)
    paths = sorted(path.relative_to(root) for path in root.glob("*/images/*.png"))
    labels = np.random.default_rng(seed).permutation([path.parts[0] for path in paths])
    manifest = root / "permuted.csv"
    pd.DataFrame({"path": [str(path) for path in paths], "label": labels}).to_csv(manifest, index=False)
    return str(manifest)


def randomised(model: str, target: str) -> str:
    """Save the model with a UNet of initial weights (Adebayo et al. 2018); return its folder."""
    if not (Path(target) / "diffva.json").exists():
        bundle = load(model)
        bundle.unet.load_state_dict(build(bundle.recipe.model_copy(update={"seed": 77})).unet.state_dict())
        save(bundle, open_store(target), {})
    return target


def of(metrics: dict[str, Any], table: str, **match: Any) -> dict[str, Any]:
    rows = [row for row in metrics.get(table, []) if all(row[key] == value for key, value in match.items())]
    return rows[0] if rows else {}


def made(recipe: Recipe, data: str, model: str, out: Path, request: Request, threshold_from: Path | None) -> dict:
    generate_run(recipe, data, model, str(out), request, Execution(executor="inline"))
    options = Options(threshold_from=str(threshold_from) if threshold_from else None)
    return reduce(open_run(str(out)), options, executor="inline").metrics


def maps_of(run: Run) -> tuple[list[np.ndarray], list[np.ndarray | None], np.ndarray]:
    """Return positive parts, regions and image-level scores (98 % quantile of the positive part in the region) of a
    run."""
    saliency, regions = [], []
    for row in as_records(read_records(run)):
        saliency.append(positive(decode_map(run.store.read(row["attribution_path"]))))
        regions.append(read_truth(run, row, {}).region)
    inside = [found if region is None else found[region] for found, region in zip(saliency, regions, strict=True)]
    return saliency, regions, np.array([np.quantile(part, 0.98) for part in inside])


def rank_auroc(ill: np.ndarray, healthy: np.ndarray) -> float:
    return float((ill[:, None] > healthy).mean() + 0.5 * (ill[:, None] == healthy).mean())


def row_of(name: str, recipe: Recipe, model: str, data: dict[str, str], out: Path, request: Request) -> dict[str, Any]:
    """Compute one row: scores on abnormal images, false attribution on healthy ones."""
    metrics: dict[str, Any] = {}
    for split, source in (("validation", None), ("test", out / "validation")):
        metrics = made(recipe, data[split], model, out / split, request, source)
    status = read_status(str(out / "test"))
    healthy = Request(classes=[recipe.data.healthy_class], prompt=request.prompt)
    for split in ("validation", "test"):
        generate_run(recipe, data[split], model, str(out / f"healthy-{split}"), healthy, Execution(executor="inline"))
    runs = {name: open_run(str(out / name)) for name in ("test", "healthy-validation", "healthy-test")}
    (_, _, ill), (calm, lungs, _), (unseen, localization, well) = (maps_of(run) for run in runs.values())
    threshold = conformal_threshold(calm, lungs)
    place = of(metrics, "localization", map="positive", label="all")
    counterfactual, flips = of(metrics, "ground_truth", label="all"), of(metrics, "validity", label="all")
    counted = calls(recipe.generate.model_dump(), len(recipe.data.prompts))
    by_class = {row["label"]: row["auroc"] for row in metrics["localization"] if row["map"] == "positive"}
    return {
        "method": name,
        **{key: place.get(key) for key in SCORES},
        "auroc_absolute": of(metrics, "localization", map="absolute", label="all").get("auroc"),
        "psnr_counterfactual": counterfactual.get("psnr"),
        "lesion_error_left": counterfactual.get("lesion_error_ratio"),
        "ssim_input": of(metrics, "ssim", label="all").get("ssim"),
        "flip_rate": flips.get("flip_rate"),
        "image_auroc": rank_auroc(ill, well),
        "energy_on_healthy_images": float(np.mean([found.mean() for found in unseen])),
        "conformal_threshold": threshold,
        "conformal_share_unseen": float(np.mean([attributed(m, r, threshold) for m, r in zip(unseen, localization)])),
        **{f"auroc {label}": value for label, value in by_class.items() if label != "all"},
        "unet_calls": counted.unet,
        "core_seconds_a_image": sum(status["seconds_by_stage"].values()) / status["done"],
    }


def gradient_rows(run: Run, model: str, smoothing: float) -> list[dict[str, Any]]:
    """Score gradient maps of the latent classifier, which needs no counterfactual, on the images of a finished run."""
    classifier = ImageClassifier(LatentDiffusion(load(model)))
    rows = []
    for members in by_shard(as_records(read_records(run))).values():
        images = [read_images(run, row) for row in members]
        truths = [read_truth(run, row, {}) for row in members]
        stacked = np.stack([image.image for image in images])
        for name, function in BASELINES.items():
            found = function(classifier, stacked)
            for saliency, truth in zip(found, truths, strict=True):
                rows += score_image({name: smooth(positive(np.asarray(saliency)), smoothing)}, truth)
    table = pd.DataFrame([{key: row[key] for key in ("map", *SCORES) if key in row} for row in rows])
    return [
        {"method": f"latent classifier: {name}", **group.drop(columns="map").mean().to_dict()}
        for name, group in table.groupby("map", sort=False)
    ]


def picture(folder: Path) -> bytes:
    """Draw per class an image, its ground-truth counterfactual, and the counterfactual and signed map of every method.

    All maps have one colour scale; methods without a finished run below ``folder`` are omitted.
    """
    names = [name for name in METHODS if (folder / slug(name) / "test" / "_SUCCESS").exists()]
    runs = {name: open_run(str(folder / slug(name) / "test")) for name in names}
    tables = {name: read_records(run).set_index("image_path") for name, run in runs.items()}
    first = tables[names[0]]
    paths = [sorted(first.index[first["label"] == label])[0] for label in dict.fromkeys(first["label"])]
    figure = Figure(figsize=(1.02 * (len(names) + 1), 2.2 * len(paths) + 0.55), facecolor="white")
    panels = figure.subplots(
        2 * len(paths), len(names) + 1, squeeze=False, gridspec_kw={"wspace": 0.04, "hspace": 0.04}
    )
    figure.subplots_adjust(0.005, 0.005, 0.995, 1 - 0.5 / figure.get_figheight())
    for row, path in enumerate(paths):
        truth = read_truth(runs[names[0]], {**first.loc[path].to_dict(), "image_path": path}, {})
        for column, name in enumerate(names, 1):
            record = {**tables[name].loc[path].to_dict(), "image_path": path}
            images = read_images(runs[name], record)
            above, below = panels[2 * row : 2 * row + 2, column]
            above.imshow(images.counterfactual, cmap="gray", vmin=0, vmax=1)
            below.imshow(images.signed_map, cmap=DIVERGING, vmin=-SCALE, vmax=SCALE)
            outline(below, truth.lesion)
            if row == 0:
                above.set_title(name.replace(", ", ",\n").replace("inversion", "inv."), fontsize=6.5, color=INK, pad=3)
        above, below = panels[2 * row : 2 * row + 2, 0]
        above.imshow(images.image, cmap="gray", vmin=0, vmax=1)
        below.imshow(
            images.image if truth.counterfactual is None else truth.counterfactual, cmap="gray", vmin=0, vmax=1
        )
        if row == 0:
            above.set_title("image, and under it\nits ground-truth counterfactual", fontsize=6.5, color=INK, pad=3)
    for axes in panels.flat:
        axes.set_axis_off()
    return png(figure)


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def one_seed(work: Path, recipe: Recipe, seed: int, count: int, only: tuple[str, ...]) -> list[dict[str, Any]]:
    size, folder = recipe.model.resolution, work / f"seed-{seed}"
    train = images(work, "train", seed, TRAINING_IMAGES, size)
    data = {split: images(work, split, 0, n, size) for split, n in (("validation", 160), ("test", count * 4 // 3))}

    def asked(name: str) -> bool:
        return not only or any(text in name for text in only)

    methods = (changes.get("method", recipe.generate.method) for row, changes in METHODS.items() if asked(row))
    needed = {KNOWN[method].needs for method in methods}
    if not only:  # the gradient maps need the classifier
        needed.add("classifier")
    extras = tuple(stage for stage in EXTRAS if stage["trains"].replace("-", "_") in needed)
    name = "model" if len(extras) == len(EXTRAS) else "-".join(["model", *(stage["name"] for stage in extras)])
    model, table = trained(work, recipe, train, name, seed, extras), []

    def line(name: str, changes: dict[str, Any], model: str, prompt: str | None = None) -> None:
        if not asked(name):
            return
        used = make_recipe(
            {**recipe.model_dump(mode="json"), "generate": {**recipe.generate.model_dump(mode="json"), **changes}}
        )
        where = folder / slug(name)
        LOG.info("seed %d: %s", seed, name)
        table.append(row_of(name, used, model, data, where, Request(prompt=prompt)))

    for name, changes in METHODS.items():
        line(name, changes, model)
    if not only:
        run = open_run(str(folder / "ddim-inversion" / "test"))
        metrics = json.loads(run.store.read("tables/metrics.json"))
        for name in TRIVIAL:
            place = of(metrics, "localization", map=name, label="all")
            table.append({"method": f"baseline: {name}", **{key: place.get(key) for key in SCORES}})
        table += gradient_rows(run, model, recipe.generate.smoothing)
    line("sanity: the disease's prompt", {"num_inference_steps": 17}, model, recipe.data.prompt("COVID"))
    line("sanity: random UNet", {"num_inference_steps": 17}, randomised(model, str(work / f"random-{seed}")))
    if seed == 0 and asked("sanity: permuted labels"):
        shuffled = trained(work, recipe, permuted(train, seed), "permuted", seed, ())
        line("sanity: permuted labels", {"num_inference_steps": 17}, shuffled)
    return table


@click.command()
@click.option("--work", default="runs/attribution", show_default=True, type=click.Path(path_type=Path))
@click.option("--seeds", default="0,1,2", show_default=True, help="Training seeds.")
@click.option("--images", "count", default=300, show_default=True, help="Abnormal test images.")
@click.option("--recipe", "recipe_name", default="phantom", show_default=True)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe; repeatable."
)
@click.option("--threads", default=1, show_default=True)
@click.option("--only", multiple=True, metavar="ROW", help="Compute only the rows that contain this text.")
@click.option("--result", default="experiments/results/attribution.json", type=click.Path(path_type=Path))
@click.option("--picture", "target", default="docs/images/methods.png", type=click.Path(path_type=Path))
def main(
    work: Path, seeds: str, count: int, recipe_name: str, overrides: tuple[str, ...], threads: int,
    only: tuple[str, ...], result: Path, target: Path,
) -> None:  # fmt: skip
    set_up_logging()
    torch.set_num_threads(threads)
    work, recipe = work.absolute(), load_recipe(recipe_name, overrides)
    numbers = [int(seed) for seed in seeds.split(",")]
    rows = [{"seed": seed, **row} for seed in numbers for row in one_seed(work, recipe, seed, count, only)]
    table = pd.DataFrame(rows)
    grouped = table.drop(columns="seed").groupby("method", sort=False)
    about = {
        "command": f"python experiments/attribution.py --seeds {seeds} --images {count} --recipe {recipe_name}"
        + "".join(f" --set {text}" for text in overrides),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "versions": {name: version(name) for name in ("torch", "diffusers", "captum")},
        "code_revision": code_revision(),
        "test_images": count,
        "mean": json.loads(grouped.mean().reset_index().to_json(orient="records")),
        "spread": json.loads(grouped.std().reset_index().to_json(orient="records")) if len(numbers) > 1 else None,
        "rows": json.loads(table.to_json(orient="records")),
    }
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(about, indent=1))
    if not only:
        target.write_bytes(picture(work / f"seed-{numbers[-1]}"))
    click.echo(grouped.mean().round(3).reset_index().to_string(index=False))


if __name__ == "__main__":
    main()
