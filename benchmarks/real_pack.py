"""Real films against radiologists' boxes: patient-level cross-validation of the small architecture.

    python benchmarks/real_pack.py --pack ../shared/data --base runs/demo/model --out runs/real-cv

Lung_Opacity against Normal of one source (NIH), because class is confounded with source in the pack. Boxed films are
cut into three folds by patient; for each test fold, settings are chosen on the next fold (validation) and the model is
trained on the rest and on the unboxed films, none of whose patients is in either. Scores are over the whole film: the
pack has no lung masks for these classes. Intervals: bootstrap over patients.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import time
from pathlib import Path

import click
import numpy as np
import pandas as pd

from diffva_ray import ray_cluster
from diffva_ray.config import load_recipe
from diffva_ray.data.datasets import open_dataset
from diffva_ray.evaluate.records import read_records
from diffva_ray.evaluate.reduction import lesion_boxes
from diffva_ray.evaluate.scores import score_records
from diffva_ray.generate.plan import Request, parse_sweep
from diffva_ray.metrics.localization import dice_at, fixed_threshold, patient_bootstrap
from diffva_ray.observe import set_up_logging
from diffva_ray.pipeline import existing_run, generate_run, train_model
from diffva_ray.provenance import code_revision
from diffva_ray.storage import open_store

FOLDS = 3
SWEEP = ("strength=0.5,0.7", "guidance_scale=1.5,3.0")
MAPS = ("positive", "absolute", "brightness", "autoencoder_difference", "centre_prior")


def films_of(pack: Path) -> pd.DataFrame:
    """Films of NIH's source: columns path (absolute), label, patient, boxed."""
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


def write_fold(films: pd.DataFrame, folder: Path, boxes: pd.DataFrame) -> None:
    """A Radiography folder of those films, with the boxes of the ones that have any."""
    rows = []
    for n, film in enumerate(films.itertuples()):
        name = f"{film.label}/images/{n:04d}-{Path(film.path).name}"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(Path(film.path).read_bytes())
        if film.boxed:
            of_film = boxes[[film.path.endswith("/" + file) for file in boxes["file"]]]
            rows += [f"{name},{box.x},{box.y},{box.w},{box.h}" for box in of_film.itertuples()]
    (folder / "boxes.csv").write_text("\n".join(["file,x,y,w,h", *rows]) + "\n")
    (folder / "patients.json").write_text(json.dumps(dict(enumerate(films["patient"]))))


def scored(run_uri: str, folder: Path) -> pd.DataFrame:
    """Localisation rows of a run on a fold, with settings and patient."""
    run = existing_run(run_uri)
    records = read_records(run)
    boxes = lesion_boxes(str(folder), None, [])
    rows, _ = score_records(run, open_store(folder), records.to_dict("records"), boxes)
    patients = json.loads((folder / "patients.json").read_text())
    frame = pd.DataFrame(rows).merge(records[["record_id", "strength", "guidance_scale"]], on="record_id")
    frame["patient"] = [patients[str(int(Path(path).name.split("-")[0]))] for path in frame["source_path"]]
    return frame


@click.command()
@click.option("--pack", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--base", default="runs/demo/model", show_default=True)
@click.option("--out", default="runs/real-cv", show_default=True)
@click.option(
    "--result", default="benchmarks/results/real_pack.json", show_default=True, type=click.Path(path_type=Path)
)
def main(pack: Path, base: str, out: str, result: Path) -> None:
    set_up_logging()
    began = time.monotonic()
    pack = pack.resolve()
    films, boxes = films_of(pack), pd.read_csv(pack / "boxes.csv")
    patients = sorted(films[films["boxed"]]["patient"].unique())
    np.random.default_rng(0).shuffle(patients)
    fold_of = {patient: n % FOLDS for n, patient in enumerate(patients)}
    films["fold"] = films["patient"].map(fold_of).fillna(-1).astype(int)
    recipe = load_recipe("real64", [f"model.base={Path(base).resolve()}"])
    test_rows, chosen = [], []
    with ray_cluster.session():
        for fold in range(FOLDS):
            place = Path(out) / f"fold-{fold}"
            validation_fold = (fold + 1) % FOLDS
            sets = {
                "test": films[films["boxed"] & (films["fold"] == fold)],
                "validation": films[films["boxed"] & (films["fold"] == validation_fold)],
                "train": films[~films["fold"].isin([fold, validation_fold])],
            }
            for name, chosen_films in sets.items():
                if not (place / name).exists():
                    write_fold(chosen_films, place / name, boxes)
            train_model(recipe, str(place / "train"), str(place / "model"))
            sweep = Request(classes=("Lung_Opacity",), sweep=parse_sweep(SWEEP))
            generate_run(recipe, str(place / "validation"), str(place / "model"), str(place / "tune"), sweep)
            tuned = scored(str(place / "tune"), place / "validation")
            ours = tuned[tuned["map"] == "positive"].groupby(["strength", "guidance_scale"])["auroc"].mean()
            strength, guidance = ours.idxmax()
            best = tuned[(tuned["strength"] == strength) & (tuned["guidance_scale"] == guidance)]
            settings = [f"generate.strength={strength}", f"generate.guidance_scale={guidance}"]
            tuned_recipe = load_recipe("real64", [f"model.base={Path(base).resolve()}", *settings])
            generate_run(
                tuned_recipe, str(place / "test"), str(place / "model"), str(place / "run"), Request(("Lung_Opacity",))
            )
            found = scored(str(place / "run"), place / "test")
            for name in MAPS:
                threshold, _ = fixed_threshold(np.stack(best[best["map"] == name]["dice_curve"].to_list()))
                rows = found["map"] == name
                curves = np.stack(found[rows]["dice_curve"].to_list())
                found.loc[rows, "dice_fixed"] = dice_at(curves, threshold)
            test_rows.append(found.assign(fold=fold))
            chosen.append(
                {"strength": float(strength), "guidance_scale": float(guidance), "validation": float(ours.max())}
            )
    table = summary(pd.concat(test_rows))
    about = {
        "command": f"python benchmarks/real_pack.py --pack PACK --base {base}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "training_films": len(open_dataset(str(Path(out) / "fold-0" / "train")).films),
        "code_revision": code_revision(),
        "seconds": round(time.monotonic() - began),
        "boxed_films": int(films["boxed"].sum()),
        "patients": len(patients),
        "chosen_on_validation": chosen,
        "table": table,
    }
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(about, indent=1))
    click.echo(pd.DataFrame(table).to_string(index=False))


def summary(rows: pd.DataFrame) -> list[dict[str, object]]:
    """Mean over all test films with a patient-bootstrap interval, for each map."""
    table = []
    for name, metric in itertools.product(MAPS, ("auroc", "auprc", "dice_fixed", "pointing_game")):
        of_map = rows[rows["map"] == name]
        low, high = patient_bootstrap(of_map[metric].to_numpy(), of_map["patient"].tolist())
        mean = float(of_map[metric].mean())
        table.append({"map": name, "metric": metric, "n": len(of_map), "mean": round(mean, 3),
                      "low": round(low, 3), "high": round(high, 3)})  # fmt: skip
    return table


if __name__ == "__main__":
    main()
