"""Measure the overhead of Ray over ``--executor inline``, for the same records on the same cores.

    python benchmarks/data_plane.py --model runs/demo/model --data runs/demo/data/test

Each run is a separate process, restricted with its children to the same cores; both compute with one thread. For Ray
this is one actor plus driver, raylet, GCS and object store, which share a single core with it. Rates are those between
the first and the last commit, so start-up is excluded; it is reported separately, as the seconds to the first commit
minus the seconds of a shard. Turns are interleaved.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from diffva_ray.generate.run import find_run
from diffva_ray.provenance import code_revision, version
from diffva_ray.storage.opening import open_store


def turn(executor: str, words: list[str], out: Path, cores: str) -> dict[str, Any]:
    """Execute one run; return seconds to the first commit, seconds per shard afterwards, and seconds by stage."""
    command = [
        "taskset", "--cpu-list", cores, sys.executable, "-m", "diffva_ray.cli", "generate", *words,
        "--out", str(out), "--executor", executor, *(["--actors", "1"] if executor == "ray" else []),
    ]  # fmt: skip
    began = time.time()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise click.ClickException(f"{executor} failed: {done.stderr[-800:]}")
    run = find_run(open_store(str(out)))
    assert run is not None
    commits = sorted((file.stat().st_mtime, file.stem) for file in (out / "records").glob("part-*.parquet"))
    each = (commits[-1][0] - commits[0][0]) / (len(commits) - 1)
    stages: dict[str, float] = {}
    for _, part in commits[1:]:
        for stage, seconds in json.loads((out / "timings" / f"{part}.json").read_text()).items():
            stages[stage] = stages.get(stage, 0.0) + seconds / (len(commits) - 1)
    return {
        "seconds_a_shard": each,
        "seconds_before": commits[0][0] - began - each,
        "work_a_shard": sum(stages.values()),
        "stages": {stage: round(seconds, 3) for stage, seconds in stages.items()},
        "records": run.about["records"],
        "shards": run.shards,
        "pixels": run_pixels(out),
    }


def run_pixels(out: Path) -> list[str]:
    """Return the hashes of all counterfactuals, by record."""
    import pyarrow.parquet as pq

    table = pq.read_table(out / "records", columns=["record_id", "counterfactual_sha256"]).to_pydict()
    return [sha256 for _, sha256 in sorted(zip(table["record_id"], table["counterfactual_sha256"], strict=True))]


@click.command()
@click.option("--model", required=True)
@click.option("--data", required=True)
@click.option("--records", default=96, show_default=True)
@click.option("--shard-size", default=16, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--cores", default="0,1", show_default=True, help="Cores of all processes; 0: core 0 alone.")
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "results" / "data_plane.json")
def main(model: str, data: str, records: int, shard_size: int, rounds: int, cores: str, out: Path) -> None:
    words = [
        "--model", model, "--data", data, "--limit", str(records), "--shard-size", str(shard_size),
        "--micro-batch", str(shard_size), "--method", "sdedit", "--scheduler", "ddim",
        "--set", 'generate.source_prompt=""', "--set", 'generate.negative_prompt=""',
    ]  # fmt: skip
    turns: dict[str, list[dict[str, Any]]] = {"inline": [], "ray": []}
    with tempfile.TemporaryDirectory(prefix="diffva-plane-") as name:
        for number in range(rounds):
            for executor in ("inline", "ray")[:: 1 if number % 2 else -1]:
                turns[executor].append(turn(executor, words, Path(name) / f"{executor}{number}", cores))
                click.echo(f"{executor}: {turns[executor][-1]['seconds_a_shard']:.3f} s a shard")
    if any(one["pixels"] != turns["inline"][0]["pixels"] for several in turns.values() for one in several):
        raise click.ClickException("the runs made different pictures")

    def median(executor: str, key: str) -> float:
        return round(statistics.median(one[key] for one in turns[executor]), 3)

    pairs = list(zip(turns["ray"], turns["inline"], strict=True))
    ratios = [ray["seconds_a_shard"] / inline["seconds_a_shard"] for ray, inline in pairs]
    # share of the time between two commits outside all stages; it does not depend on the load of the machine
    idle = {
        executor: [1 - one["work_a_shard"] / one["seconds_a_shard"] for one in several]
        for executor, several in turns.items()
    }
    result = {
        "command": f"python benchmarks/data_plane.py --model MODEL --data DATA --records {records} "
        f"--shard-size {shard_size} --rounds {rounds} --cores {cores}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, held to {cores}",
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "versions": {library: version(library) for library in ("torch", "ray")},
        "code": code_revision(),
        "records": turns["inline"][0]["records"],
        "shards": turns["inline"][0]["shards"],
        "seconds_a_shard": {executor: median(executor, "seconds_a_shard") for executor in turns},
        "ray_over_inline": {
            "median": round(statistics.median(ratios), 4), "least": round(min(ratios), 4), "most": round(max(ratios), 4)
        },
        "share_outside_the_stages": {executor: round(statistics.median(idle[executor]), 4) for executor in turns},
        "seconds_before_the_first_shard": {executor: median(executor, "seconds_before") for executor in turns},
        "stages_of_a_shard": {executor: turns[executor][0]["stages"] for executor in turns},
    }  # fmt: skip
    click.echo(json.dumps(result, indent=1))
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
