"""Synthetic runs of any size: planned by the real planner, with a few image files shared by all records."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffva_ray.config.recipe import load_recipe
from diffva_ray.data.dataset import Dataset, LabelledImage
from diffva_ray.data.encoding import encode_grey, encode_map, quantise
from diffva_ray.generate.keys import pixel_keys
from diffva_ray.generate.plan import Request, make_plan
from diffva_ray.generate.run import Run, part, start_run
from diffva_ray.schema import RECORDS
from diffva_ray.storage.local import LocalStore

SIZE = 32
LABELS = ("COVID", "Lung_Opacity", "Viral Pneumonia")
VIEWS = {"COVID": ("PA", "10.9375"), "Lung_Opacity": ("LATERAL", None)}  # view, and spacing in mm: 350 mm are 32 pixels
HOSTILE = "</script><img src=x onerror=alert(1)>\"'&\n\u2028${x} "  # a reason and a prompt
HOSTILE_NAME = "a'b\"<script>alert(1)<\\script>&amp;#%20 é.png"  # a file name: everything but slashes


def make_run(folder: Path, images: int, hostile: bool) -> Run:
    """A run of ``images`` records without a model; all records share the same files."""
    data, store = LocalStore(str(folder / "data")), LocalStore(str(folder / "run"))
    random = np.random.default_rng(0)
    _shared_files(data, store, random)
    dataset_images = []
    for n in range(images):
        name = HOSTILE_NAME if hostile and n == 1 else f"image-{n:05d}.png"
        path, label = f"{LABELS[n % 3]}/images/{name}", LABELS[n % 3]
        (folder / "data" / path).parent.mkdir(parents=True, exist_ok=True)
        os.link(folder / "data" / "image.png", folder / "data" / path)
        dataset_images.append(LabelledImage(path, label, 1, "lungs.png", "lesion.png", "counterfactual.png"))
    recipe = load_recipe("phantom", [f"model.resolution={SIZE}", "generate.shard_size=500"])
    request = Request(prompt=HOSTILE if hostile else "normal chest scan")
    table = make_plan(Dataset(data, dataset_images, "phantoms"), recipe, request)
    about = {
        "recipe": recipe.model_dump(mode="json"), "data": data.uri, "data_root": data.uri, "data_kind": "phantoms",
        "model": str(folder / "model"), "code_revision": "abc123", "started": "2025-01-01T00:00:00+00:00",
    }  # fmt: skip
    (folder / "model").mkdir()
    (folder / "model" / "diffva.json").write_text(
        json.dumps({"format": 2, "recipe": {"name": "tiny"}, "digest": "d" * 64, "data_kind": "phantoms"})
    )
    run = start_run(store, table, pixel_keys(recipe, request, "d" * 64, "2.0", "cpu"), about)
    for shard in range(run.shards):
        rows = [_record(row, hostile, random) for row in run.planned(shard)]
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=RECORDS), sink)
        run.store.put(f"records/{part(shard)}.parquet", sink.getvalue())
    return run


def _shared_files(data: LocalStore, store: LocalStore, random: np.random.Generator) -> None:
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    lungs = (np.abs(np.abs(x - 0.5) - 0.22) < 0.14) & (np.abs(y - 0.5) < 0.34)
    lesion = (x - 0.3) ** 2 + (y - 0.4) ** 2 < 0.01
    counterfactual = (0.75 - 0.5 * lungs + 0.03 * random.normal(size=(SIZE, SIZE))).clip(0, 1)
    for name, pixels in {
        "image": counterfactual + 0.3 * lesion,
        "counterfactual": counterfactual,
        "lungs": lungs,
        "lesion": lesion,
    }.items():
        data.put(f"{name}.png", encode_grey(quantise(pixels.clip(0, 1).astype(np.float32))))
    store.put("counterfactuals/part-00000/counterfactual.png", encode_grey(quantise(counterfactual.astype(np.float32))))
    store.put("reconstructions/part-00000/counterfactual.png", encode_grey(quantise(counterfactual.astype(np.float32))))
    store.put("attributions/part-00000/map.png", encode_map(0.2 * lesion + 0.03 * random.normal(size=(SIZE, SIZE))))


def _record(row: dict[str, Any], hostile: bool, random: np.random.Generator) -> dict[str, Any]:
    columns = {name: row.get(name) for name in RECORDS.names}
    columns["view"], columns["spacing"] = VIEWS.get(row["label"], (None, None))
    if int(row["record_id"], 16) % 50 == 0 or (hostile and int(row["record_id"], 16) % 4 == 0):
        return {**columns, "status": "bad_image", "error": f"damaged {HOSTILE}" if hostile else "truncated PNG"}
    before, after = random.beta(1, 6), random.beta(6, 1)
    return {
        **columns, "status": "ok", "width": SIZE, "height": SIZE, "ssim": random.uniform(0.7, 1), "psnr": 25.0,
        "counterfactual_path": "counterfactuals/part-00000/counterfactual.png",
        "reconstruction_path": "reconstructions/part-00000/counterfactual.png",
        "attribution_path": "attributions/part-00000/map.png",
        "attribution_energy": random.uniform(0, 0.05), "judge_image": before, "judge_counterfactual": after,
    }  # fmt: skip
