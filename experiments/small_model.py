"""Train the model that comes with the package (``small``) from real images, and write it as float16.

    python experiments/small_model.py --data ../shared/data/real/train --out runs/small

Three trainings by ``diffva train``'s own code (recipes in ``small_model.yaml``): an autoencoder on the real images; the
denoiser on pairs that need labels only (findings drawn into normal images, parts of abnormal images pasted into them);
and for comparison the same with lesions cut out along their boxes. There is no judge: on these images ours reached an
accuracy of 0.56 (chance 0.50). An interrupted script continues where it
stopped. About four hours of two cores.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import click
import torch
import yaml

from diffva_ray.config.recipe import make_recipe
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.implants import Source, implant_set
from diffva_ray.data.transplants import Donors
from diffva_ray.model.bundle import load, save
from diffva_ray.model.card import CARD, file_sha256
from diffva_ray.model.training_images import IMAGE_DIGITS
from diffva_ray.progress import LOG, set_up_logging
from diffva_ray.storage.local import LocalStore
from diffva_ray.workflows.train import train_model

SIZE = 128
FINDINGS = ("Lung_Opacity", "Effusion", "Atelectasis", "Mass", "Nodule", "Pneumothorax")
DRAWN = ("Normal", "Lung_Opacity", "Effusion", "Lung_Opacity", "Atelectasis", "Mass", "Nodule", "Pneumothorax",
         "Effusion", "Lung_Opacity")  # fmt: skip
ANYWHERE = ("Lung_Opacity", "Effusion", "Atelectasis", "Mass", "Pneumothorax")
SETS = {  # name: number of images, seed, classes, where lesions are cut out
    "drawn": (17500, 11, DRAWN, None),
    "anywhere": (4000, 12, ANYWHERE, "anywhere"),
    "boxes": (6000, 13, FINDINGS, "boxes"),
}
RESULTS = Path(__file__).parent / "results" / "real_images.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
UNTRAINED = "Other_abnormal"  # a class of 21 images with anything


def make_sets(data: str, place: Path) -> None:
    """Write the three sets of implants beside a link to the real images."""
    dataset = open_dataset(data)
    (place / "real").unlink(missing_ok=True)
    (place / "real").symlink_to(Path(data).resolve())
    for name, (count, seed, classes, where) in SETS.items():
        if (place / name / "implants.json").exists():
            continue
        shutil.rmtree(place / name, ignore_errors=True)
        donors = Donors(dataset, "Normal", classes, SIZE, where == "boxes") if where else None
        written = implant_set(LocalStore(str(place / name)), dataset, "Normal", count, SIZE,
                              Source(seed, True, donors), classes)  # fmt: skip
        LOG.info("%d images of set %s", sum(1 for _ in written), name)


def manifest(place: Path, name: str, every: dict[str, int]) -> str:
    """Write a manifest of every n-th image of several sets; the ground truth of an implant is found beside it."""
    files = [file for folder, n in every.items() for file in sorted((place / folder).glob("*/images/*"))[::n]]
    rows = [(file.relative_to(place).as_posix(), file.parts[-3]) for file in files if file.parts[-3] != UNTRAINED]
    with (place / name).open("w", newline="") as table:
        csv.writer(table).writerows([("path", "label"), *rows])
    return str(place / name)


def recipe(values: dict[str, Any], part: dict[str, Any], base: Path | None) -> dict[str, Any]:
    """The values of one training: what all share, its stages, and the model that it starts from."""
    model = dict(values["model"])
    if base:
        model = {key: model[key] for key in ("resolution", "tokenizer_length", "attention_mask")} | {"base": str(base)}
    return {"name": values["name"], "description": values["description"], "seed": values["seed"], "model": model,
            "train": {**values["train"], "stages": part["stages"]}, "generate": values["generate"]}  # fmt: skip


def export(model: Path, out: Path, values: dict[str, Any], real: Path) -> str:
    """Write the model as float16, with its sources and a recipe without paths of this machine."""
    bundle = load(str(model))
    for module in bundle.modules.values():
        module.to(torch.float16)
    for module in (bundle.unet, bundle.vae):
        module.register_to_config(_name_or_path=values["name"])  # else the folder that it was loaded from
    bundle.recipe = make_recipe({**bundle.recipe.model_dump(mode="json"), "model": values["model"]})
    shutil.rmtree(out, ignore_errors=True)
    seen = sorted(file_sha256(file)[:IMAGE_DIGITS] for file in real.glob("*/images/*"))
    card = {key: bundle.card[key] for key in ("diffva_ray", "code_revision", "versions", "machine")}
    card |= {"data_kind": "radiography", "images": len(seen), "training_images": seen, **values["card"]}
    digest = save(bundle, LocalStore(str(out)), card)
    if RESULTS.exists() and (sentence := measured(json.loads(RESULTS.read_text()), out)):
        saved = json.loads((out / CARD).read_text())
        (out / CARD).write_text(json.dumps({**saved, "measured": sentence}, indent=1))
    return digest


def measured(results: dict[str, Any], model: Path) -> str | None:
    """The sentence for sheets, from the results of ``real_images.py`` on this model; None if they are of another."""
    digest = file_sha256(model / WEIGHTS)
    names = [name for name, about in results["models"].items() if about["unet_sha256"] == digest]
    if not names:
        return None
    row, prior = (next(row for row in results["rows"] if row["map"] == name) for name in (names[0], "learned prior"))
    hits = {finding: scores["pointing"] for finding, scores in row["by_finding"].items() if scores["images"] >= 20}
    listed = ", ".join(f"{finding.replace('_', ' ').lower()} {hit:.0%}" for finding, hit in hits.items())
    return (
        f"On {results['images']} images of other people the highest point of such maps lay in a radiologist's box in "
        f"{row['pointing'][0]:.0%} (knowing only where boxes usually are: {prior['pointing'][0]:.0%}); {listed}."
    )


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True, file_okay=False), help="Real images with boxes.")
@click.option("--out", default="runs/small", show_default=True, type=click.Path(path_type=Path))
def main(data: str, out: Path) -> None:
    """Train and export the small model."""
    set_up_logging()
    values = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
    make_sets(data, out / "sets")
    for name, part in values["parts"].items():
        if not (out / name / "diffva.json").exists():
            images = manifest(out / "sets", f"images-{name}.csv", part["sets"])
            base = out / part["base"] if "base" in part else None
            train_model(make_recipe(recipe(values, part, base)), images, str(out / name), 1, 0.0, "inline")
    LOG.info("digest %s", export(out / "labels", out / "small", values, out / "sets" / "real"))


if __name__ == "__main__":
    main()
