"""Measure time and memory of the work on records without networks: plan, resume, read a shard, reduce.

    python benchmarks/planning.py --sizes 10000,100000,1000000,10000000

Records are synthetic: up to 250,000 images of three classes, swept over ten strengths and sampled until the number is
reached. Parts are real files. Images and features do not exist: the store ``Pretended`` reports them and gives every
record the same images, of which reduce reads a sample. No lesion is known, and no image is a reference. Every
measurement is a separate process; memory is its peak. ``requests``: number of S3 LIST requests (1,000 names each).
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diffva_ray.data.encoding import encode_grey, encode_map, quantise

IMAGES = 250_000
SHARD = 256
CLASSES = ("COVID", "Lung_Opacity", "Viral Pneumonia")


def plan(folder: str, records: int) -> dict[str, Any]:
    from diffva_ray.config.recipe import load_recipe
    from diffva_ray.data.dataset import Dataset, LabelledImage
    from diffva_ray.generate.keys import pixel_keys
    from diffva_ray.generate.plan import Request, make_plan, parse_sweep
    from diffva_ray.generate.run import start_run
    from diffva_ray.storage.opening import open_store

    images = min(records, IMAGES)
    points = min(10, -(-records // images))
    draws = -(-records // (images * points))
    recipe = load_recipe("phantom", [f"generate.samples={draws}", f"generate.shard_size={SHARD}"])
    listed = [
        LabelledImage(f"{label}/images/{label}-{n}.png", label, 4000 + n % 1000, f"{label}/masks/{label}-{n}.png")
        for n, label in zip(range(images), itertools.cycle(CLASSES))
    ]
    request = Request(
        limit=records,
        sweep=parse_sweep(
            ["strength=" + ",".join(f"{0.3 + 0.05 * n:.2f}" for n in range(points))] if points > 1 else []
        ),
    )
    store = open_store(folder)
    began = time.perf_counter()
    table = make_plan(Dataset(store, listed, "synthetic"), recipe, request)
    made = time.perf_counter()
    run = start_run(
        store,
        table,
        pixel_keys(recipe, request, "m", "t", "cpu"),
        {
            "recipe": recipe.model_dump(mode="json"),
            "data": folder,
            "data_root": folder,
            "data_kind": "synthetic",
            "model": folder,
        },
    )
    return {
        "seconds_plan": made - began,
        "seconds_write": time.perf_counter() - made,
        "plan_megabytes": (Path(folder) / "plan.parquet").stat().st_size / 1e6,
        "footer_megabytes": (run.about["plan_footer"]["stop"] - run.about["plan_footer"]["start"]) / 1e6,
        "shards": run.shards,
    }


def opened(folder: str) -> Any:
    from diffva_ray.generate.run import find_run
    from diffva_ray.storage.opening import open_store

    return find_run(open_store(folder))


def resume(folder: str, records: int) -> dict[str, Any]:
    """Measure a resume with half of the parts present."""
    run = opened(folder)
    parts = Path(folder) / "records"
    parts.mkdir(exist_ok=True)
    for shard in range(0, run.shards, 2):
        (parts / f"part-{shard:05d}.parquet").touch()
    began = time.perf_counter()
    pending = run.pending()
    listed = time.perf_counter()
    sizes = run.shard_sizes()
    assert sum(sizes) == records
    return {
        "seconds_listing": listed - began,
        "seconds_sizes": time.perf_counter() - listed,
        "requests": -(-(run.shards - len(pending)) // 1000),
    }


def worker(folder: str, records: int) -> dict[str, Any]:
    """Measure a worker's reads: its first shard, and one more."""
    run = opened(folder)
    began = time.perf_counter()
    run.planned(0)
    first = time.perf_counter()
    assert len(run.planned(run.shards // 2)) in (SHARD, records % SHARD)
    return {"seconds_first_shard": first - began, "seconds_next_shard": time.perf_counter() - first}


def write_parts(folder: str, records: int) -> dict[str, Any]:
    """Write the parts of a finished run. Not measured: workers write a part as a piece of each shard."""
    from diffva_ray.generate.run import FOLDERS, part
    from diffva_ray.schema import RECORDS

    run = opened(folder)
    parts, random = Path(folder) / "records", np.random.default_rng(0)
    for old in parts.glob("*"):
        old.unlink()
    plan = pq.ParquetFile(Path(folder) / "plan.parquet")
    for group in range(plan.num_row_groups):
        table = plan.read_row_group(group)
        for shard in pc.unique(table["shard"]).to_pylist():
            planned = table.filter(pc.equal(table["shard"], shard))
            n, columns = len(planned), {}
            for field in RECORDS:
                if field.name in planned.column_names:
                    columns[field.name] = planned[field.name]
                elif field.type == pa.float64():
                    columns[field.name] = pa.array(random.uniform(0.2, 0.9, n))
                else:
                    columns[field.name] = pa.repeat(pa.scalar(FILLED.get(field.name, FILL[field.type]), field.type), n)
            for kind, name in zip(FOLDERS, ("counterfactual_path", "attribution_path", "reconstruction_path")):
                ids = planned["record_id"].to_pylist()
                columns[name] = pa.array([f"{kind}/{part(shard)}/{record}.png" for record in ids])
            schema = RECORDS.with_metadata({"fingerprint": run.fingerprint})
            pq.write_table(pa.table(columns, schema=schema), parts / f"{part(shard)}.parquet", compression="zstd")
    return {"parts_megabytes": sum(file.stat().st_size for file in parts.iterdir()) / 1e6}


GREY = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (64, 1))
IMAGE, MAP = encode_grey(quantise(GREY)), encode_map(GREY - 0.5)  # files of all records
HASHES = {name: hashlib.sha256(IMAGE).hexdigest() for name in ("image", "counterfactual", "reconstruction")}
FILL = {pa.string(): "", pa.int32(): 5, pa.int64(): 5}
FILLED = {
    "status": "ok", "error": "", "map": "compensated", "source_prompt": "COVID 19", "model_digest": "m" * 64,
    **{f"{name}_sha256": value for name, value in HASHES.items()},
    "attribution_sha256": hashlib.sha256(MAP).hexdigest(),
}  # fmt: skip


def reduce(folder: str, records: int) -> dict[str, Any]:
    """Measure ``diffva reduce``; only the images are simulated."""
    from diffva_ray.evaluate.options import Options
    from diffva_ray.evaluate.reduction import reduce_run
    from diffva_ray.generate.run import FOLDERS, find_run, part
    from diffva_ray.storage import opening
    from diffva_ray.storage.local import LocalStore
    from diffva_ray.storage.store import Entry

    class Pretended(LocalStore):
        """A folder that reports every image and generates every feature that its records name."""

        def ids(self, path: str) -> list[str]:
            data = io.BytesIO(super().read(f"records/{Path(path).stem}.parquet"))
            return pq.ParquetFile(data).read(["record_id"]).column(0).to_pylist()

        def list(self, prefix: str = "") -> list[Entry]:
            kind, _, name = prefix.partition("/")
            if kind in FOLDERS:
                return [Entry(f"{prefix}/{record}.png", 2000) for record in self.ids(name)]
            if prefix == "features":
                shards = opened(folder).shards
                return [Entry(f"features/{part(shard)}.npz", 70_000) for shard in range(shards)]
            return super().list(prefix)

        def read(self, path: str) -> bytes:
            if path.endswith(".png"):
                return MAP if path.startswith("attributions/") else IMAGE
            if not path.startswith("features/"):
                return super().read(path)
            ids = self.ids(path)
            random = np.random.default_rng(int(path[-9:-4]))
            rows = random.standard_normal((2, len(ids), 64)).astype(np.float32)
            sink = io.BytesIO()
            np.savez(sink, **{"ids": np.array(ids), f"{NAME}/source": rows[0], f"{NAME}/counterfactual": rows[1]})
            return sink.getvalue()

    from diffva_ray.metrics.features import stand_in

    NAME = stand_in().name
    opening.STORES[""] = Pretended
    run = find_run(Pretended(folder))
    assert run is not None
    began = time.perf_counter()
    metrics = reduce_run(run, f"{folder}/images", Options()).metrics
    assert metrics["records"]["ok"] == records
    return {"seconds": time.perf_counter() - began, "rows_of_distances": len(metrics["fid"])}


STEPS = {"plan": plan, "resume": resume, "worker": worker, "write_parts": write_parts, "reduce": reduce}


def measured(step: str, folder: str, records: int) -> dict[str, Any]:
    """Run one step in its own process."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", step, folder, str(records)], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@click.command()
@click.option("--sizes", default="10000,100000,1000000", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "results" / "planning.json")
@click.option("--one", nargs=3, hidden=True)
def main(sizes: str, out: Path, one: tuple[str, str, str] | None) -> None:
    if one:
        found = STEPS[one[0]](one[1], int(one[2]))
        found["peak_megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({key: round(value, 3) for key, value in found.items()}))
        return
    from diffva_ray.provenance import code_revision, version

    curve = []
    for records in (int(size) for size in sizes.split(",")):
        with tempfile.TemporaryDirectory(prefix="diffva-planning-") as folder:
            curve.append({"records": records, **{step: measured(step, folder, records) for step in STEPS}})
        click.echo(json.dumps(curve[-1]))
        result = {
            "command": f"python benchmarks/planning.py --sizes {sizes}",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "load_average": [round(value, 1) for value in os.getloadavg()],
            "versions": {name: version(name) for name in ("pyarrow", "numpy")},
            "code": code_revision(),
            "curve": curve,
        }
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
