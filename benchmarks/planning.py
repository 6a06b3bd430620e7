"""Time and memory of what happens to records before and after their films: plan, resume, read a shard, metadata.

    python benchmarks/planning.py --sizes 10000,100000,1000000,10000000

Records are synthetic: up to 250,000 films, swept and drawn until there are enough; parts are made without images. Every
measurement is a process of its own; memory is its peak. ``requests`` is what a listing would cost on S3 (1,000 names
each).
"""

from __future__ import annotations

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

FILMS = 250_000
REDUCE_UP_TO = 100_000  # records whose parts are written; each takes milliseconds


def plan(folder: str, records: int) -> dict[str, Any]:
    from diffva_ray.config import load_recipe
    from diffva_ray.data.films import Dataset, Film
    from diffva_ray.generate.plan import Request, make_plan, parse_sweep, pixel_keys, start_run
    from diffva_ray.storage import open_store

    films = min(records, FILMS)
    points = min(10, -(-records // films))
    draws = -(-records // (films * points))
    recipe = load_recipe("phantom", [f"generate.draws={draws}", "generate.shard_size=64"])
    listed = [
        Film(f"COVID/images/COVID-{n}.png", "COVID", 4000 + n % 1000, f"COVID/masks/COVID-{n}.png")
        for n in range(films)
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
        store, table, pixel_keys(recipe, request, "m", "t", "cpu"), {"recipe": recipe.model_dump(mode="json")}
    )
    return {
        "seconds_plan": made - began,
        "seconds_write": time.perf_counter() - made,
        "plan_megabytes": (Path(folder) / "plan.parquet").stat().st_size / 1e6,
        "footer_megabytes": (run.about["plan_footer"]["stop"] - run.about["plan_footer"]["start"]) / 1e6,
        "shards": run.shards,
    }


def opened(folder: str) -> Any:
    from diffva_ray.generate.plan import open_run
    from diffva_ray.storage import open_store

    return open_run(open_store(folder))


def resume(folder: str, records: int) -> dict[str, Any]:
    """Half of the parts are there."""
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
    """What a worker reads: its first shard, and one more."""
    run = opened(folder)
    began = time.perf_counter()
    run.shard_rows(0)
    first = time.perf_counter()
    assert len(run.shard_rows(run.shards // 2)) == 64
    return {"seconds_first_shard": first - began, "seconds_next_shard": time.perf_counter() - first}


def reduce(folder: str, records: int) -> dict[str, Any]:
    """The parts that reduce reads: metadata alone."""
    from diffva_ray.evaluate.records import read_records
    from diffva_ray.generate.plan import part
    from diffva_ray.generate.shard import records_part

    run = opened(folder)
    for shard in range(run.shards):
        rows = [{**row, "status": "ok", "ssim": 0.9, "pixel_sha256": "0" * 64} for row in run.shard_rows(shard)]
        run.store.put(f"records/{part(shard)}.parquet", records_part(run, shard, rows))
    began = time.perf_counter()
    assert len(read_records(run)) == records
    return {"seconds_reading_records": time.perf_counter() - began}


STEPS = {"plan": plan, "resume": resume, "worker": worker, "reduce": reduce}


def measured(step: str, folder: str, records: int) -> dict[str, Any]:
    """One step in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", step, folder, str(records)], check=True, capture_output=True, text=True
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
            steps = [step for step in STEPS if step != "reduce" or records <= REDUCE_UP_TO]
            curve.append({"records": records, **{step: measured(step, folder, records) for step in steps}})
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
