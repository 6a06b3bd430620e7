"""Compare published text encoders side by side: frozen or trained jointly, with one-word labels or with sentences.

    make demo && python experiments/text_encoders.py                       # encoders from the hub, or from its cache
    python experiments/text_encoders.py --snapshots FOLDER --untrained     # FOLDER/radbert ..., of random weights
    python experiments/text_encoders.py --base CompVis/stable-diffusion-v1-4 --recipe paper --data ... --validation ...

Every row replaces the text encoder of one base and trains the denoiser for the same number of steps on the same images,
with the same noise. Labels are the prompts of the classes; sentences are the column ``caption`` of a table of the same
images. Scores use the abnormal validation images and the judge of ``--judge``. A row that is done is not made again,
and an interrupted row continues. Rows of snapshots with random weights compare a frozen random encoder with one that
is trained, and say nothing about what is gained by reading radiology reports beforehand.
"""

from __future__ import annotations

import itertools
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import click
import pandas as pd
from training_choices import MIXED, score

from diffva_ray.config.recipe import Recipe, load_recipe, make_recipe
from diffva_ray.data.datasets import open_dataset
from diffva_ray.model.card import read_card
from diffva_ray.progress import set_up_logging
from diffva_ray.provenance import code_revision, version
from diffva_ray.storage.opening import open_store
from diffva_ray.train.checkpoint import Checkpoints
from diffva_ray.train.loop import train

ENCODERS = ("own", "radbert", "radbert-roberta", "biobert", "pubmedclip", "clip")  # own: the base's
TRAINED = {"frozen": False, "joint": True}
PROMPTS = ("labels", "sentences")
KEY = ("encoder", "training", "prompts", "seed")  # columns that name a row
QUICK = ("generate.num_inference_steps=4", "generate.micro_batch=4")


def recipe_of(base: Recipe, model: dict[str, Any], seed: int, **stage: Any) -> Recipe:
    """The recipe of one row: the base's networks with another text encoder, and one denoiser stage."""
    values = base.model_dump(mode="json")
    kept = {key: values["model"][key] for key in ("resolution", "tokenizer_length", "attention_mask")}
    weights = {label: 2 if label == base.data.healthy_class else 1 for label in base.data.prompts}
    stages = [{**MIXED, "name": "denoiser", "classes": weights, **stage}]
    values["train"] |= {"stages": stages, "checkpoints_to_keep": 1}
    return make_recipe({**values, "model": {**kept, **model}, "seed": seed})


def make_row(recipe: Recipe, data: str, validation: str, judge: Path, model: Path) -> dict[str, Any]:
    """Train and score one row in the folder ``model``, or return what was found there before."""
    done = model / "row.json"
    if done.exists():
        return json.loads(done.read_text())
    if not (model / "diffva.json").exists():
        report = Checkpoints(model / ".train", 1)
        train(
            recipe, data, str(model), fingerprint="text-encoders", provenance={}, report=report,
            resume=report.latest(), threads=1,
        )  # fmt: skip
    shutil.copytree(judge, model / "judge", dirs_exist_ok=True)
    card = read_card(open_store(str(model))) or {}
    origin = card.get("text_source", {})
    row = {"commit": origin.get("commit"), **score(recipe, validation, str(model), str(model / "run"))}
    done.write_text(json.dumps(row))
    return row


@click.command()
@click.option("--demo", default="runs/demo", show_default=True, help="A finished `diffva demo`.")
@click.option("--base", help="Base: diffusers folder or hub id; default: the demo's model.")
@click.option("--recipe", default="phantom", show_default=True, help="Recipe of the data and the sampling settings.")
@click.option("--data", help="Training images; default: the demo's.")
@click.option("--captions", help="Table of these images with a column caption; default: DATA/captions.csv.")
@click.option("--validation", help="Abnormal images with ground truth; default: the demo's.")
@click.option("--judge", help="Folder judge of a model; default: the demo's.")
@click.option("--snapshots", type=click.Path(path_type=Path), help="Folder of local snapshots by short name.")
@click.option("--untrained", is_flag=True, help="State in the result that the snapshots have random weights.")
@click.option("--encoders", default=",".join(ENCODERS), show_default=True, help="Short names, or own.")
@click.option("--tokens", default=77, show_default=True, help="Tokens of a prompt, but for the base's own encoder.")
@click.option("--steps", default=1000, show_default=True, help="Training steps of the denoiser in every row.")
@click.option("--seeds", default=2, show_default=True, help="Training seeds.")
@click.option("--quick", is_flag=True, help="Two steps of four images, one seed and few sampler steps: a trial.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder of the models; default: DEMO/text-encoders.")
@click.option("--result", default="experiments/results/text_encoders.json", type=click.Path(path_type=Path))
def main(
    demo: str, base: str | None, recipe: str, data: str | None, captions: str | None, validation: str | None,
    judge: str | None, snapshots: Path | None, untrained: bool, encoders: str, tokens: int, steps: int, seeds: int,
    quick: bool, work: Path | None, result: Path,
) -> None:  # fmt: skip
    set_up_logging()
    steps, batch, seeds = (2, 4, 1) if quick else (steps, MIXED["batch_size"], seeds)
    # The recipe of a base that is a model of ours is its own.
    base = base or f"{demo}/model"
    card = read_card(open_store(base)) if Path(base).is_dir() else None
    values = card["recipe"] if card else load_recipe(recipe).model_dump(mode="json")
    shared = make_recipe(values, QUICK if quick else ())
    # Labels are the folders' classes, sentences a column of a table.
    data = data or f"{demo}/data/train"
    sources = dict(zip(PROMPTS, (data, captions or f"{data}/captions.csv"), strict=True))
    images = {name: len(open_dataset(source)) for name, source in sources.items()}
    if len(set(images.values())) > 1:
        raise click.UsageError(f"labels and sentences are of different images: {images}")
    work = work or Path(demo) / "text-encoders"

    table: list[dict[str, Any]] = []
    for name, training, prompts, seed in itertools.product(encoders.split(","), TRAINED, PROMPTS, range(seeds)):
        model: dict[str, Any] = {"base": base}
        if name != "own":
            model |= {"text_encoder": str(snapshots / name) if snapshots else name, "tokenizer_length": tokens}
        made = make_row(
            recipe_of(shared, model, seed, train_text_encoder=TRAINED[training], steps=steps, batch_size=batch),
            sources[prompts],
            validation or f"{demo}/data/validation",
            Path(judge or f"{demo}/model/judge"),
            work / f"{steps}-{name}-{training}-{prompts}-{seed}",
        )
        table.append({**dict(zip(KEY, (name, training, prompts, seed), strict=True)), **made})
        about = {
            "command": f"python experiments/text_encoders.py --encoders {encoders} --steps {steps} --seeds {seeds}"
            + (" --quick" if quick else "") + (" --snapshots FOLDER" if snapshots else ""),
            "encoders": "snapshots of random weights" if untrained else "as published",
            "machine": f"{platform.machine()}, 1 thread, no GPU",
            "versions": {key: version(key) for key in ("torch", "diffusers", "transformers")},
            "code_revision": code_revision(),
            "training_images": images["labels"],
            "rows": table,
        }  # fmt: skip
        result.parent.mkdir(parents=True, exist_ok=True)
        result.write_text(json.dumps(about, indent=1) + "\n")
    shown = pd.DataFrame(table).drop(columns="commit").groupby(list(KEY[:3]), sort=False).mean().drop(columns="seed")
    click.echo(shown.round(3).to_string())


if __name__ == "__main__":
    main()
