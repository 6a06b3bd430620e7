"""Measure the CPU time of a record beside the networks, of this revision and of an earlier one.

    git worktree add /tmp/before REVISION
    python benchmarks/host.py --before /tmp/before --out benchmarks/results/host.json

Phantoms of 1024 pixels, records of 512 pixels, one thread: decode the PNG, compute all metrics of a record (with the
judge and the features of FID's random-feature extractor), encode its three PNGs. Turns of the two revisions alternate;
every turn is a process, and the median turn counts.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import click
import numpy as np
from decode import KEPT_MEMORY, ROOT, processor, revision

SIDE, SIZE, IMAGES = 1024, 512, 12


def measure() -> dict[str, float]:
    """CPU milliseconds a record, by stage, and the bytes stored, of the installed revision."""
    import torch
    from PIL import Image
    from scipy.ndimage import gaussian_filter

    from diffva_ray.config.recipe import load_recipe
    from diffva_ray.data.encoding import encode_grey, encode_map, quantise
    from diffva_ray.data.images import decode_square
    from diffva_ray.data.phantoms import phantom
    from diffva_ray.generate.measures import measure as metrics
    from diffva_ray.generate.measures import unit
    from diffva_ray.metrics.features import stand_in
    from diffva_ray.metrics.validity import Judge

    torch.set_num_threads(1)
    config, extractor = load_recipe("recommended").generate, stand_in()
    judge, rng = Judge(["Normal", "COVID"], "Normal").eval(), np.random.default_rng(0)
    spent = Counter[str]()

    def timed(stage: str, work: Any) -> Any:
        began = time.process_time()
        done = work()
        spent[stage] += 1000 * (time.process_time() - began)
        return done

    for patient in range(-2, IMAGES):  # the first images of a process are slower, until its memory has grown
        if patient == 0:
            spent.clear()
        made = phantom("COVID", patient + 2, 0, SIDE)
        file = BytesIO()
        Image.fromarray(quantise(made.image)).save(file, "PNG")
        image, _ = timed("decode", partial(decode_square, file.getvalue(), SIZE))
        # An autoencoder smooths, and adds little of its own.
        noise = [0.005 * gaussian_filter(rng.normal(size=image.shape), 1) for _ in range(2)]
        counterfactual, reconstruction = (quantise(gaussian_filter(image, 0.7) + one) for one in noise)
        _, signed = timed("metrics", partial(metrics, image, counterfactual, reconstruction, None, config, judge))
        timed("features", partial(extractor, np.stack([image, unit(counterfactual)])))
        pairs = ((encode_grey, counterfactual), (encode_grey, reconstruction), (encode_map, signed))
        spent["bytes"] += sum(len(timed("PNGs", partial(encode, pixels))) for encode, pixels in pairs)
    return {stage: total / IMAGES for stage, total in spent.items()}


@click.command()
@click.option("--before", type=click.Path(exists=True, path_type=Path), help="Checkout of the earlier revision.")
@click.option("--turns", default=5, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Result file (JSON).")
@click.option("--measure", "only", is_flag=True, hidden=True)
def main(before: Path | None, turns: int, out: Path | None, only: bool) -> None:
    """Measure both revisions in turns and write the medians."""
    if only:
        click.echo(json.dumps(measure()))
        return
    checkouts = {"after": ROOT, **({"before": before.resolve()} if before else {})}
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    for _ in range(turns):
        for name, checkout in checkouts.items():
            environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", **KEPT_MEMORY}
            command = [sys.executable, str(Path(__file__)), "--measure"]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            seen[name].append(json.loads(done.stdout))
    stages = list(seen["after"][0])
    result = {
        "what": f"CPU ms of a record of {SIZE} pixels beside the networks, one thread; median of {turns} turns",
        "machine": {"processor": processor(), "cpus": os.cpu_count(), "python": platform.python_version()},
        "revisions": {name: revision(checkout) for name, checkout in checkouts.items()},
        "records": {
            name: {stage: round(statistics.median(turn[stage] for turn in found), 1) for stage in stages}
            for name, found in seen.items()
        },
    }
    from diffva_ray.provenance import publish  # here, because the measured revisions may lack it

    publish(result, out)


if __name__ == "__main__":
    main()
