"""Every reference system beside ours, on phantoms: the same wall time to train, the same search, three seeds.

    taskset -c 0 python experiments/related_work.py [--minutes 20] [--budget 240] [--only vant-gan] [--work FOLDER]
    python experiments/related_work.py --quick          # minutes, at toy size: only that every row runs

**Training.** Each seed has one model of ours (autoencoder, denoiser, classifier of noisy latents, judge). A reference
that has to be trained is trained beside it, on the same images, for at most ``--minutes`` of wall time, which is what
ours takes; GANs stop earlier when their curve has converged (docs/methods.md). The others have our denoiser's steps.

**Search.** Every row, ours included, has four candidates (SEARCH): settings of generation, or of training where the
method has none, then trained for a quarter of the time each. On validation images of seed 0 the one of the highest
AUROC is chosen, for all seeds. The judge takes no part.

**Result.** For each row and seed: scores on unseen images, the candidates with their AUROC, the training curve, its
criterion and whether it was met, minutes, steps, parameters. For each row the paired difference of AUROC to ours, over
test images and seeds, with its interval.

**Resuming.** Trainings, runs and rows below ``--work`` are kept. With ``--budget`` no row is begun after so many
minutes; the same command goes on. Wall time is only fair on a core that nothing else uses; ``taskset`` also keeps
PyTorch's threads from waiting for each other.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from attribution import images, of, slug
from map_rows import CALLS, MAP_ROWS, SMOOTHING, scored

from diffva_ray.config.methods import METHODS
from diffva_ray.config.recipe import Recipe, load_recipe, make_recipe
from diffva_ray.data.images import decode_map
from diffva_ray.evaluate.options import Options
from diffva_ray.evaluate.records import as_records, read_records, read_truth
from diffva_ray.evaluate.scores import score_image
from diffva_ray.generate.cost import calls
from diffva_ray.generate.plan import Request
from diffva_ray.generate.run import open_run
from diffva_ray.metrics.intervals import paired_difference
from diffva_ray.metrics.localization import positive
from diffva_ray.model.bundle import load
from diffva_ray.progress import LOG, set_up_logging
from diffva_ray.provenance import code_revision, version
from diffva_ray.references.training import converged, curve
from diffva_ray.storage.opening import open_store
from diffva_ray.train.progress import read_progress
from diffva_ray.workflows.execution import Execution
from diffva_ray.workflows.generate import generate_run
from diffva_ray.workflows.reduce import reduce
from diffva_ray.workflows.status import read_status
from diffva_ray.workflows.train import train_model

Settings = dict[str, Any]
OURS = "ddim-inversion"
SCORES = ("auroc", "auprc", "dice_best", "dice_fixed", "pointing_game")
PLAIN = {"source_prompt": "", "negative_prompt": ""}  # of methods that no source prompt reaches
GAN = {"steps": 100000, "batch_size": 8, "learning_rate": 5e-4, "warmup_steps": 20, "ema_decay": 0.99,
       "block_out_channels": [8, 16, 32], "norm_num_groups": 4, "measure_every": 100,
       "stop_when_converged": True}  # fmt: skip
STEPS = {"steps": 3000, "batch_size": 16, "learning_rate": 2e-3, "warmup_steps": 30, "schedule": "cosine",
         "ema_decay": 0.997}  # fmt: skip
CLASSIFIER = {"name": "classifier", "trains": "classifier", "steps": 900, "batch_size": 32, "learning_rate": 2e-3,
              "warmup_steps": 20, "schedule": "cosine", "ema_decay": 0.98,
              "classes": {"<healthy>": 3, "<abnormal>": 1}}  # fmt: skip


IMAGE_CLASSIFIER = {"name": "image-classifier", "trains": "image-classifier", "steps": 250, "batch_size": 64,
                    "learning_rate": 4e-3, "warmup_steps": 20, "schedule": "cosine"}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A line of the leaderboard."""

    method: str
    search: tuple[Settings, ...]  # candidates: settings of generation, or of the stage where ``tunes_training``
    settings: Settings = field(default_factory=dict)  # of generation, the same for all candidates
    stage: Settings | None = None  # trained beside our model
    tunes_training: bool = False
    explains: bool = False  # a classifier of images, which is trained before


def grid(**values: tuple[Any, ...]) -> tuple[Settings, ...]:
    """Candidates of one key, or the products of two."""
    made: list[Settings] = [{}]
    for key, options in values.items():
        made = [{**one, key: option} for one in made for option in options]
    return tuple(made)


def scales(*values: float) -> tuple[Settings, ...]:
    return tuple({"classifier_guided": {"scale": value}} for value in values)


STRENGTHS = grid(strength=(0.45, 0.6), guidance_scale=(2.5, 4.0))
ENCODED = {**PLAIN, "scheduler": "ddim", "num_inference_steps": 20, "strength": 0.6, "guidance_scale": 2.5}
ROWS = {
    OURS: Row(OURS, STRENGTHS),
    "masked": Row("masked", STRENGTHS),
    "sdedit": Row("sdedit", grid(strength=(0.4, 0.55), guidance_scale=(2.5, 4.0)),
                  {**PLAIN, "num_inference_steps": 30}),
    "va-gan": Row("va-gan", grid(map_weight=(5.0, 10.0, 20.0, 50.0)), PLAIN, GAN, True),
    "vant-gan": Row("vant-gan", grid(map_weight=(0.0, 5.0, 10.0, 20.0)), PLAIN, GAN, True),
    "ant-gan": Row("ant-gan", grid(cycle_weight=(5.0, 10.0), identity_weight=(5.0, 10.0)), PLAIN, GAN, True),
    "singla": Row("singla", grid(classifier_weight=(1.0, 5.0), cycle_weight=(5.0, 10.0)), PLAIN, GAN, True, True),
    "charachon": Row("charachon", grid(distance_weight=(5.0, 20.0), closeness_weight=(2.0, 10.0)), PLAIN, GAN, True,
                     True),
    "steex": Row("steex", tuple({"references": {"proximity": weight, "learning_rate": rate}}
                                for weight in (0.01, 0.1) for rate in (0.02, 0.05)),
                 {**ENCODED, "num_inference_steps": 60, "strength": 1.0}, explains=True),
    "anoddpm": Row("anoddpm", grid(strength=(0.15, 0.25, 0.35, 0.5)), {**ENCODED, "num_inference_steps": 60},
                   {**STEPS, "trains": "healthy-unet"}),
    "autoddpm": Row("autoddpm", grid(strength=(0.2, 0.35)) + tuple(
        {"strength": strength, "references": {"mask_quantile": 0.9}} for strength in (0.2, 0.35)),
        {**ENCODED, "num_inference_steps": 60}, {**STEPS, "trains": "healthy-unet"}),
    "what-is-healthy": Row("what-is-healthy", STRENGTHS, ENCODED),
    "wolleb": Row("wolleb", scales(3, 10, 30, 60), ENCODED),
    "diff-scm": Row("diff-scm", scales(3, 10, 30, 60), ENCODED),
    "swiss-army-knife": Row("swiss-army-knife", scales(1, 3, 10, 30), ENCODED),
    "time": Row("time", grid(strength=(0.45, 0.6)) + tuple(
        {"strength": strength, "references": {"editing_weight": 1.0}} for strength in (0.45, 0.6)),
        {"scheduler": "ddim", "num_inference_steps": 20}),
    "textual-inversion": Row("textual-inversion", STRENGTHS, ENCODED,
                             {**STEPS, "steps": 1000, "learning_rate": 5e-3, "ema_decay": None,
                              "weight_decay": 0.0, "trains": "textual-inversion"}),
}  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """What all rows share."""

    work: Path
    recipe: Recipe
    minutes: float  # of training
    training: int  # images
    validation: int
    test: int
    toy: bool = False  # a few steps of every stage, and one candidate of every row

    def data(self, split: str, seed: int) -> str:
        size, count = self.recipe.model.resolution, getattr(self, {"train": "training"}.get(split, split))
        return images(self.work, split, seed if split == "train" else 0, count, size)

    def ours(self, seed: int) -> Path:
        """Our model of a seed, with the classifier that some references follow, and the judge of all rows."""
        values = self.recipe.model_dump(mode="json")
        values["seed"] = seed
        values["train"]["stages"].append(self.shortened(CLASSIFIER))
        return self.trained(values, seed, f"ours-{seed}")

    def beside(self, seed: int, stage: Settings, minutes: float, name: str, explains: bool = False) -> Path:
        """A reference beside our model of a seed, with its judge."""
        base, values = self.ours(seed), self.recipe.model_dump(mode="json")
        if "measure_every" in stage:
            stage = {**stage, "max_minutes": minutes}
        stage = self.shortened(stage)
        text = {key: values["model"][key] for key in ("resolution", "tokenizer_length", "attention_mask")}
        values |= {"seed": seed, "name": "reference", "model": {**text, "base": str(base)}}
        before = [self.shortened(IMAGE_CLASSIFIER)] if explains else []
        values["train"]["stages"] = [*before, *([{"name": stage["trains"], **stage}] if stage else [])]
        folder = self.trained(values, seed, name)
        if not (folder / "judge").exists():
            shutil.copytree(base / "judge", folder / "judge")
        return folder

    def shortened(self, stage: Settings) -> Settings:
        points = {"measure_every": 2} if "measure_every" in stage else {}
        return {**stage, "steps": 4, "batch_size": 4, **points} if self.toy and stage else stage

    def trained(self, values: dict[str, Any], seed: int, name: str) -> Path:
        folder, begun = self.work / name, time.monotonic()
        if train_model(make_recipe(values), self.data("train", seed), str(folder), executor="inline"):
            LOG.info("%s trained in %.1f min", name, (time.monotonic() - begun) / 60)
        return folder


def stage_of(row: Row, name: str, candidate: Settings) -> Settings:
    stage = {"trains": name, **(row.stage or {})}
    return {**stage, **candidate} if row.tunes_training else stage


def model_of(setup: Setup, name: str, seed: int, candidate: Settings, share: float, tag: str) -> Path:
    """The model of a row, trained for ``share`` of the time where it is to be trained."""
    row = ROWS[name]
    if row.stage is None and row.explains:
        return setup.beside(seed, {}, setup.minutes, f"image-classifier-{seed}", explains=True)
    if row.stage is None:
        return setup.ours(seed)
    stage = stage_of(row, name, candidate)
    shared = stage["trains"] if not row.tunes_training else f"{name}{tag}"  # one model for all candidates, two methods
    return setup.beside(seed, stage, setup.minutes * share, f"{shared}-{seed}", row.explains)


def generated(
    setup: Setup, name: str, model: Path, split: str, candidate: Settings, out: Path, **options: Any
) -> tuple[Recipe, dict[str, Any]]:
    """Generate a row's counterfactuals of a split and reduce them; return the run's metrics."""
    row, values = ROWS[name], setup.recipe.model_dump(mode="json")
    changes = {"method": row.method, **row.settings, **({} if row.tunes_training else candidate)}
    if isinstance(changes.get("references"), dict):
        changes["references"] = {**values["generate"]["references"], **changes["references"]}
    recipe = make_recipe({**values, "generate": {**values["generate"], **changes}})
    abnormal = [label for label in recipe.data.prompts if label != recipe.data.healthy_class]
    generate_run(
        recipe, setup.data(split, 0), str(model), str(out), Request(classes=abnormal), Execution(executor="inline")
    )
    return recipe, reduce(open_run(str(out)), Options(**options), executor="inline").metrics


def chosen(setup: Setup, name: str) -> list[dict[str, Any]]:
    """The candidates with their AUROC on validation images of seed 0, the best first; kept in a file."""
    file = setup.work / "search" / f"{slug(name)}.json"
    if file.exists():
        return list(json.loads(file.read_text()))
    tried = []
    for n, candidate in enumerate(ROWS[name].search[: 1 if setup.toy else None]):
        share = 1 / len(ROWS[name].search) if ROWS[name].tunes_training else 1.0
        model = model_of(setup, name, 0, candidate, share, f"-candidate-{n}")
        out = setup.work / "search" / f"{slug(name)}-{n}"
        _, metrics = generated(setup, name, model, "validation", candidate, out)
        place = of(metrics, "localization", map="positive", label="all")
        tried.append({"candidate": candidate, "auroc": place["auroc"]})
        LOG.info("%s %s: AUROC %.3f", name, candidate, place["auroc"])
    tried.sort(key=lambda one: -one["auroc"])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(tried))
    return tried


def training_of(model: Path, stage: Settings | None) -> dict[str, Any]:
    """Curve, criterion, minutes and steps of a row's own training, from the model's progress."""
    if stage is None:
        return {"curve": None, "criterion": "no training of its own"}
    progress = read_progress(open_store(str(model)))
    assert progress is not None
    history = [entry.model_dump() for entry in progress.history]
    points = curve(history, stage["trains"])
    about = {"minutes": progress.seconds / 60, "steps": history[-1]["step"]}
    if points:
        return {
            **about,
            "curve": points,
            "criterion": "removed and change on a plateau",
            "converged": converged(points),
        }
    losses = [{"step": entry["step"], "loss": entry["loss"]} for entry in history if "loss" in entry]
    return {
        **about,
        "curve": losses[:: max(1, len(losses) // 50)],
        "criterion": "a fixed number of steps, cosine decay",
    }


def own_parameters(model: Path, method: str) -> int:
    """Parameters of what the method runs: its network, or our UNet and autoencoder, and both where it needs both."""
    bundle, needs = load(str(model)), METHODS[method].needs
    networks = [bundle.extra(needs)] if needs else []
    if not METHODS[method].keeps_image:
        networks += [bundle.vae, *([] if needs == "healthy_unet" else [bundle.unet, bundle.text_encoder])]
    return sum(parameter.numel() for network in networks for parameter in network.parameters())


def of_images(out: Path) -> dict[str, float]:
    """AUROC of the map of every image of a run, by path."""
    run, scores = open_run(str(out)), {}
    for row in as_records(read_records(run)):
        saliency = positive(decode_map(run.store.read(row["attribution_path"])))
        for one in score_image({"positive": saliency}, read_truth(run, row, {})):
            scores[row["image_path"]] = float(one["auroc"])
    return scores


def line(setup: Setup, name: str, seed: int) -> dict[str, Any]:
    """One row of one seed; kept in a file."""
    file = setup.work / "rows" / f"{slug(name)}-{seed}.json"
    if file.exists():
        return dict(json.loads(file.read_text()))
    tried, row = chosen(setup, name), ROWS[name]
    candidate = tried[0]["candidate"]
    model = model_of(setup, name, seed, candidate, 1.0, "")
    out = setup.work / "rows" / f"{slug(name)}-{seed}"
    generated(setup, name, model, "validation", candidate, out / "validation")
    recipe, metrics = generated(
        setup, name, model, "test", candidate, out / "test", threshold_from=str(out / "validation")
    )
    status, place = read_status(str(out / "test")), of(metrics, "localization", map="positive", label="all")
    truth = of(metrics, "ground_truth", label="all")
    made = {
        "row": name,
        "seed": seed,
        "settings": candidate,
        "search": tried,
        **{key: place.get(key) for key in SCORES},
        "psnr_counterfactual": truth.get("psnr"),
        "lesion_error_left": truth.get("lesion_error_ratio"),
        "flip_rate": of(metrics, "validity", label="all").get("flip_rate"),
        "unet_calls": calls(recipe.generate.model_dump(), len(recipe.data.prompts)).unet,
        "core_seconds_a_image": sum(status["seconds_by_stage"].values()) / status["done"],
        "parameters": own_parameters(model, row.method),
        "training": training_of(model, stage_of(row, name, candidate) if row.stage else None),
        "images": of_images(out / "test"),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(made))
    return made


def map_line(setup: Setup, name: str, seed: int) -> dict[str, Any]:
    """A row without counterfactuals: the maps of our model, on the images of our own runs; kept in a file."""
    file = setup.work / "rows" / f"{name}-{seed}.json"
    if file.exists():
        return dict(json.loads(file.read_text()))
    line(setup, OURS, seed), line(setup, OURS, 0)
    runs = setup.work / "rows"
    tuned, _ = scored(name, setup.ours(0), runs / f"{OURS}-0" / "validation", SMOOTHING)
    mean = {width: float(np.mean([one["auroc"] for one in images.values()])) for width, images in tuned.items()}
    width = max(mean, key=lambda one: mean[one])
    found, seconds = scored(name, setup.ours(seed), runs / f"{OURS}-{seed}" / "test", (width,))
    images = found[width]
    made = {
        "row": name,
        "seed": seed,
        "settings": {"smoothing": width},
        "search": [{"candidate": {"smoothing": one}, "auroc": score} for one, score in mean.items()],
        **dict.fromkeys(SCORES),  # a Dice score needs a threshold of all images, which reduce chooses for runs
        **{key: float(np.mean([one[key] for one in images.values()])) for key in ("auroc", "auprc", "pointing_game")},
        "psnr_counterfactual": None,
        "lesion_error_left": None,
        "flip_rate": None,
        "unet_calls": CALLS[name],
        "core_seconds_a_image": seconds,
        "parameters": own_parameters(setup.ours(seed), OURS),
        "training": training_of(setup.ours(seed), None),
        "images": {path: float(one["auroc"]) for path, one in images.items()},
    }  # fmt: skip
    file.write_text(json.dumps(made))
    return made


def paired(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per row the difference of AUROC to ours over the test images, each the mean over the seeds that both have."""
    found = []
    ours = {row["seed"]: row["images"] for row in rows if row["row"] == OURS}
    for name in dict.fromkeys(row["row"] for row in rows):
        theirs = {row["seed"]: row["images"] for row in rows if row["row"] == name}
        seeds = sorted(ours.keys() & theirs.keys())
        if name == OURS or not seeds:
            continue
        paths = sorted(set.intersection(*(set(of_seed) for seed in seeds for of_seed in (ours[seed], theirs[seed]))))
        values = np.array([[np.mean([one[s][path] for s in seeds]) for one in (theirs, ours)] for path in paths])
        a, b, (low, high) = paired_difference(values, np.ones_like(values), paths)
        found.append({"row": name, "seeds": seeds, "auroc": a, "ours": b, "difference": b - a, "interval": [low, high]})
    return found


def quick() -> Recipe:
    """The phantom recipe at 32 px with a few steps of everything."""
    stages = {0: 30, 1: 60, 2: 20}
    return load_recipe("phantom", [
        "model.resolution=32", "model.vae.block_out_channels=[8, 8, 16]", "model.vae.norm_num_groups=4",
        "model.unet.block_out_channels=[16, 32]", "model.unet.sample_size=8", "model.unet.norm_num_groups=8",
        *(f"train.stages.{n}.steps={steps}" for n, steps in stages.items()),
    ])  # fmt: skip


@click.command()
@click.option("--work", default="runs/related_work", show_default=True, type=click.Path(path_type=Path))
@click.option("--seeds", default="0,1,2", show_default=True, help="Training seeds.")
@click.option("--minutes", default=20.0, show_default=True, help="Wall time of each training.")
@click.option("--budget", type=float, help="Minutes after which no further row is begun; run again to go on.")
@click.option("--only", multiple=True, metavar="ROW", help="Only these rows, and ours.")
@click.option("--quick", "small", is_flag=True, help="Toy size: shows that every row runs; its numbers mean nothing.")
@click.option("--threads", default=1, show_default=True)
@click.option("--result", default="experiments/results/related_work.json", type=click.Path(path_type=Path))
def main(
    work: Path, seeds: str, minutes: float, budget: float | None, only: tuple[str, ...], small: bool, threads: int,
    result: Path,
) -> None:  # fmt: skip
    set_up_logging()
    torch.set_num_threads(threads)
    every = (*ROWS, *MAP_ROWS)
    if unknown := set(only) - set(every):
        raise click.BadParameter(f"no row {sorted(unknown)[0]!r}; there are {', '.join(every)}", param_hint="--only")
    begun, names = time.monotonic(), [name for name in every if not only or name in (OURS, *only)]
    if small:
        setup = Setup((work / "quick").absolute(), quick(), 0.1, 24, 12, 12, True)
        seeds = "0"
    else:
        recipe = load_recipe("phantom", ["train.stages.0.steps=1000", "train.stages.1.steps=3000",
                                         "train.stages.1.ema_decay=0.997"])  # fmt: skip
        setup = Setup(work.absolute(), recipe, minutes, 4000, 120, 400)
    rows, left = [], 0
    for seed in map(int, seeds.split(",")):
        for name in names:
            done = (setup.work / "rows" / f"{slug(name)}-{seed}.json").exists()
            if not done and budget is not None and time.monotonic() - begun > 60 * budget:
                left += 1
                continue
            rows.append((map_line if name in MAP_ROWS else line)(setup, name, seed))
    about = {
        "command": "python experiments/related_work.py"
        + "".join(f" --only {name}" for name in only)
        + (" --quick" if small else f" --seeds {seeds} --minutes {minutes:g}"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "versions": {name: version(name) for name in ("torch", "diffusers")},
        "code_revision": code_revision(),
        "rows_left": left,
        "paired": paired(rows),
        "rows": [{key: value for key, value in row.items() if key != "images"} for row in rows],
    }
    target = setup.work / "related_work.json" if small or left else result
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(about, indent=1))
    for row in rows:
        click.echo(f"{row['row']:>18} seed {row['seed']}: AUROC {row['auroc']:.3f}, flips {row['flip_rate']}")
    click.echo(f"{target} written; {left} rows left" if left else f"{target} written")


if __name__ == "__main__":
    main()
