"""Measure time and memory of one Fréchet distance in 2048 dimensions, and of its interval, by the rows of the sets.

    python benchmarks/fid_rows.py --rows 10000,50000,200000

Features are random (a mixture of 64 directions, and noise), written to scratch files in the format of ``diffva
reduce``, so the measurement covers reduce's own path from there to the number. Every size is a separate process;
memory is its peak. The distance costs one pass over the rows (n d^2) and one eigendecomposition (d^3), so a straight
line through the last two sizes extrapolates to more rows; the result labels it as an extrapolation.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np

DIMENSION, DIRECTIONS = 2048, 64
EXTRAPOLATED = 10_000_000


def measure(rows: int, threads: int) -> dict[str, Any]:
    import torch

    from diffva_ray.evaluate.distances import scratch
    from diffva_ray.metrics.feature_set import BLOCK, FeatureSet, release
    from diffva_ray.metrics.fid import delete_group_jackknife, frechet_distance_features

    torch.set_num_threads(threads)
    random, sets = np.random.default_rng(0), []
    directions = random.standard_normal((DIRECTIONS, DIMENSION)).astype(np.float32)
    for shift in (0.0, 0.3):
        matrix = scratch(rows, DIMENSION)
        for start in range(0, rows, BLOCK):
            n = min(BLOCK, rows - start)
            mixed = random.standard_normal((n, DIRECTIONS), np.float32) + np.float32(shift)
            matrix[start : start + n] = mixed @ directions + random.standard_normal((n, DIMENSION), np.float32)
            release(matrix)
        sets.append(FeatureSet(matrix))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    began = time.perf_counter()
    value = frechet_distance_features(*sets)
    distance = time.perf_counter()
    low, high = delete_group_jackknife(*sets)
    return {
        "rows": rows,
        "seconds_distance": distance - began,
        "seconds_interval": time.perf_counter() - distance,
        "megabytes_before": before,
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "scratch_gigabytes": 2 * 4 * rows * DIMENSION / 1e9,
        "value": value,
        "interval": [low, high],
    }


@click.command()
@click.option("--rows", "sizes", default="10000,50000,200000", show_default=True, help="Rows of each set.")
@click.option("--threads", default=1, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "results" / "fid_rows.json")
@click.option("--one", type=int, hidden=True)
def main(sizes: str, threads: int, out: Path, one: int | None) -> None:
    if one:
        print(json.dumps(measure(one, threads)))
        return
    from diffva_ray.provenance import code_revision, version

    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    curve = []
    for rows in (int(size) for size in sizes.split(",")):
        command = [sys.executable, __file__, "--one", str(rows), "--threads", str(threads)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        curve.append(json.loads(done.stdout.splitlines()[-1]))
        click.echo(done.stdout.splitlines()[-1])
    result: dict[str, Any] = {
        "command": f"python benchmarks/fid_rows.py --rows {sizes} --threads {threads}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "versions": {name: version(name) for name in ("numpy", "scipy")},
        "code": code_revision(),
        "dimension": DIMENSION,
        "curve": curve,
    }
    if len(curve) > 1:
        slope = (curve[-1]["seconds_distance"] - curve[-2]["seconds_distance"]) / (
            curve[-1]["rows"] - curve[-2]["rows"]
        )
        whole = curve[-1]["seconds_distance"] + slope * (EXTRAPOLATED - curve[-1]["rows"])
        result["extrapolated_seconds_distance"] = {str(EXTRAPOLATED): round(whole)}
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
