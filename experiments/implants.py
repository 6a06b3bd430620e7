"""Score the methods on phantom lesions in real healthy images that the model has not seen: known truth, real anatomy.

    python experiments/implants.py --model runs/real-cv/fold-0/model --pack ../shared/data

A small version of the leaderboard: the model of one fold of ``real_pack.py`` (trained on real images and implants of
one source) on opacities in healthy images of the pack's other sources. The unedited image is the ground truth. Scores
are those of ``diffva reduce``: positive part inside the lungs, without tuning.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch

from diffva_ray.config.recipe import make_recipe
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.implants import Source, implant_set
from diffva_ray.evaluate.options import Options
from diffva_ray.generate.plan import Request
from diffva_ray.generate.run import open_run
from diffva_ray.model.bundle import load
from diffva_ray.progress import LOG, set_up_logging
from diffva_ray.provenance import code_revision, version
from diffva_ray.storage.opening import open_store
from diffva_ray.workflows.execution import Execution
from diffva_ray.workflows.generate import generate_run
from diffva_ray.workflows.reduce import reduce

NOISED = {"method": "sdedit", "source_prompt": "", "negative_prompt": ""}
METHODS: dict[str, dict[str, Any]] = {
    "sdedit, the paper's settings": {**NOISED, "scheduler": "pndm", "strength": 0.55, "guidance_scale": 4.0,
                                     "num_inference_steps": 75, "difference": "raw", "smoothing": 0.0},
    "sdedit": {**NOISED, "strength": 0.55, "guidance_scale": 4.0, "num_inference_steps": 30},
    "cycle": {"method": "cycle"},
    "ddim-inversion": {},
    "masked": {"method": "masked"},
}  # fmt: skip
BASELINES = ("brightness", "autoencoder_difference", "centre_prior")


def hosts(pack: Path, folder: Path) -> str:
    """Copy the pack's healthy images that are not from NIH; return their manifest."""
    table = pd.read_csv(pack / "manifest.csv")
    table = table[(table["kind"] == "image") & (table["class"] == "Normal")]
    table = table[~table["patient"].fillna("").str.startswith("NIH")]
    rows = []
    for file in table["file"]:
        (folder / Path(file).name).write_bytes((pack / file).read_bytes())
        rows.append((Path(file).name, "Normal"))
    pd.DataFrame(rows, columns=["path", "label"]).to_csv(folder / "hosts.csv", index=False)
    return str(folder / "hosts.csv")


def one(table: list[dict[str, Any]], **match: Any) -> dict[str, Any]:
    return next(row for row in table if all(row[key] == value for key, value in match.items()))


@click.command()
@click.option("--model", required=True)
@click.option("--pack", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--images", "count", default=120, show_default=True)
@click.option("--result", default="experiments/results/implants.json", type=click.Path(path_type=Path))
def main(model: str, pack: Path, count: int, result: Path) -> None:
    set_up_logging()
    torch.set_num_threads(1)
    bundle, rows = load(model), []
    with tempfile.TemporaryDirectory(prefix="diffva-implants-") as name:
        folder = Path(name)
        (folder / "hosts").mkdir()
        dataset = open_dataset(hosts(pack, folder / "hosts"))
        size, made = bundle.recipe.model.resolution, str(folder / "images")
        written = list(implant_set(open_store(made), dataset, "Normal", count, size, Source(4001), ("Lung_Opacity",)))
        sources = {image["source"] for image in json.loads((folder / "images/implants.json").read_text())["images"]}
        for number, (method, changes) in enumerate(METHODS.items()):
            values = bundle.recipe.model_dump(mode="json")
            values["generate"] |= changes
            out = str(folder / f"run-{number}")
            execution = Execution(executor="inline")
            generate_run(make_recipe(values), made, model, out, Request(("Lung_Opacity",)), execution)
            metrics = reduce(open_run(out), Options(), executor="inline").metrics
            place, ground_truth = one(metrics["localization"], map="positive"), metrics["ground_truth"][0]
            rows.append(
                {
                    "method": method,
                    **{key: place[key] for key in ("n", "auroc", "auprc", "dice_best", "pointing_game")},
                    "lesion_error_left": ground_truth["lesion_error_ratio"],
                    "psnr_counterfactual": ground_truth["psnr"],
                    "flip_rate": metrics["validity"][0]["flip_rate"],
                }
            )
            LOG.info("%s", rows[-1])
        for map_name in BASELINES:
            place = one(metrics["localization"], map=map_name)
            rows.append({"method": f"baseline: {map_name}", **{key: place[key] for key in
                         ("n", "auroc", "auprc", "dice_best", "pointing_game")}})  # fmt: skip
    about = {
        "command": f"python experiments/implants.py --model MODEL --pack PACK --images {count}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
        "versions": {key: version(key) for key in ("torch", "diffusers")},
        "code_revision": code_revision(),
        "model_digest": bundle.digest,
        "images": len(written),
        "hosts": len(sources),
        "rows": rows,
    }
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
