"""Synthetic runs on disk: planned by the real planner, with records and images written here instead of by a model."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffva_ray.config.recipe import load_recipe
from diffva_ray.data.dataset import Dataset, LabelledImage
from diffva_ray.data.encoding import encode_grey, encode_map, quantise
from diffva_ray.generate.keys import pixel_keys
from diffva_ray.generate.plan import Request, make_plan
from diffva_ray.generate.run import FOLDERS, Run, part, start_run
from diffva_ray.schema import RECORDS
from diffva_ray.storage.local import LocalStore

SIZE = 16
HOSTILE = '<script>alert("x")</script>&$\\frac{'  # markup, and mathematics that matplotlib cannot parse
MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """``make_run(...)`` writes a data set, a model card and a run of 12 images in 3 shards below ``tmp_path``.

    ``shards`` are committed; images named in ``bad`` are quarantined with that reason; ``trained_on`` and ``data_kind``
    are what the model's card and the run say; ``judged`` is whether a judge has seen the images.
    """

    def make(
        shards: int = 3,
        bad: dict[str, str] | None = None,
        prompt: str = "normal chest scan",
        trained_on: str = "phantoms",
        data_kind: str = "phantoms",
        judged: bool = True,
        labels: tuple[str, str] = ("COVID", "Lung_Opacity"),
    ) -> Run:
        data, store = LocalStore(str(tmp_path / "data")), LocalStore(str(tmp_path / "run"))
        random = np.random.default_rng(0)
        images = [_image(data, labels[n % 2], n, random) for n in range(12)]
        model = tmp_path / "model"
        model.mkdir(exist_ok=True)
        (model / "diffva.json").write_text(
            json.dumps({"format": 2, "recipe": {"name": "tiny"}, "digest": "d" * 64, "data_kind": trained_on})
        )
        recipe = load_recipe("phantom", [f"model.resolution={SIZE}", "generate.shard_size=4"])
        request = Request(prompt=prompt)
        table = make_plan(Dataset(data, images, data_kind), recipe, request)
        keys = pixel_keys(recipe, request, "d" * 64, "2.0", "cpu")
        about = {
            "recipe": recipe.model_dump(mode="json"), "data": data.uri, "data_root": data.uri, "model": str(model),
            "data_kind": data_kind, "code_revision": "abc123", "started": "2025-01-01T00:00:00+00:00",
        }  # fmt: skip
        run = start_run(store, table, keys, about)
        for shard in range(shards):
            _commit(run, shard, bad or {}, judged, random)
        return run

    return make


def _image(data: LocalStore, label: str, n: int, random: np.random.Generator) -> LabelledImage:
    name = f"{n:02d} {HOSTILE.replace('/', '')}.png" if n == 3 else f"{n:02d}.png"
    paths = {kind: f"{label}/{kind}/{name}" for kind in ("images", "masks", "lesions", "ground_truth")}
    lungs, lesion = np.zeros((2, SIZE, SIZE), bool)
    lungs[2:14, 2:14] = True
    lesion[4:8, 4:8] = True
    counterfactual = random.uniform(0.2, 0.6, (SIZE, SIZE)).astype(np.float32)
    pictures = {
        "images": counterfactual + 0.3 * lesion,
        "ground_truth": counterfactual,
        "masks": lungs,
        "lesions": lesion,
    }
    for kind, picture in pictures.items():
        data.put(paths[kind], encode_grey(quantise(picture.astype(np.float32))))
    size = len(data.read(paths["images"]))
    return LabelledImage(paths["images"], label, size, paths["masks"], paths["lesions"], paths["ground_truth"])


def _commit(run: Run, shard: int, bad: dict[str, str], judged: bool, random: np.random.Generator) -> None:
    rows: list[dict[str, Any]] = []
    for row in run.planned(shard):
        reason = next((why for name, why in bad.items() if name in row["image_path"]), None)
        if reason is not None:
            rows.append({**row, "status": "bad_image", "error": reason})
            continue
        names = {kind: f"{kind}/{part(shard)}/{row['record_id']}.png" for kind in FOLDERS}
        grey = random.uniform(0.2, 0.6, (SIZE, SIZE)).astype(np.float32)
        run.store.put(names["counterfactuals"], encode_grey(quantise(grey)))
        run.store.put(names["reconstructions"], encode_grey(quantise(grey)))
        run.store.put(names["attributions"], encode_map(random.normal(0, 0.1, (SIZE, SIZE))))
        healthy = random.uniform(size=2) if judged else (None, None)
        rows.append(
            {
                **row,
                "counterfactual_path": names["counterfactuals"],
                "attribution_path": names["attributions"],
                "reconstruction_path": names["reconstructions"],
                "ssim": random.uniform(0.7, 1.0),
                "attribution_energy": random.uniform(0, 0.1),
                "judge_image": healthy[0],
                "judge_counterfactual": healthy[1],
                "width": SIZE,
                "height": SIZE,
                "status": "ok",
            }
        )
    table = pa.Table.from_pylist([{name: row.get(name) for name in RECORDS.names} for row in rows], schema=RECORDS)
    sink = io.BytesIO()
    pq.write_table(table, sink)
    run.store.put(f"records/{part(shard)}.parquet", sink.getvalue())


@pytest.fixture
def hostile() -> str:
    return HOSTILE
