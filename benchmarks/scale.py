"""Measure how the distributed run scales: shards of a fixed service time on 1 to 32 simulated GPUs.

    python benchmarks/scale.py

A worker sleeps where the engine would compute, so any machine can simulate 32 GPUs. Nodes (raylets), scheduling, the
actor pool and the reports to the driver are the product's own (``distributed.generate``). Efficiency is the share of
the time that the actors work, from when the last of them has started until the first has no work left.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from diffva_ray.provenance import code_revision, version

GPUS_A_NODE = 8


@contextmanager
def pretended_gpus(gpus: int) -> Iterator[None]:
    """Start a local cluster of nodes with up to 8 simulated GPUs each, and stay connected inside the block."""
    # Keep token authentication on: a process that has used it once refuses a head without it, and the head then treats
    # the actors of the process as abandoned.
    os.environ.update(RAY_BACKEND_LOG_LEVEL="fatal", RAY_USAGE_STATS_ENABLED="0")
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    cluster.add_node(num_cpus=2, num_gpus=0, include_dashboard=False, object_store_memory=100 << 20)
    for first in range(0, gpus, GPUS_A_NODE):
        cluster.add_node(num_cpus=1, num_gpus=min(GPUS_A_NODE, gpus - first), object_store_memory=80 << 20)
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def simulate(actors: int, shards: int, service: float) -> list[dict[str, Any]]:
    """Return one report per shard: shard, worker, and start and end of its work (clock of this machine)."""
    from diffva_ray.distributed.generate import generate

    class Sleeper:  # defined here to be pickled by value: workers do not have this file
        def __init__(self, *localization: str) -> None:
            self.gpu = threading.Lock()  # one shard at a time, as in ``generate.worker.Turns``

        def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
            with self.gpu:
                began = time.time()
                time.sleep(service)
                ended = time.time()
            return {"shard": [int(batch["shard"][0])], "worker": [os.getpid()], "began": [began], "ended": [ended]}

    reports: list[dict[str, Any]] = []
    generate("run", "data", "model", list(range(shards)), reports.append, actors, 1.0, worker=Sleeper)
    return reports


def efficiency(reports: list[dict[str, Any]], actors: int) -> float:
    """Return the share of the time that all ``actors`` work, while all of them have work."""
    first, last = {}, {}
    for report in sorted(reports, key=lambda report: report["began"]):
        first.setdefault(report["worker"], report["began"])
        last[report["worker"]] = report["ended"]
    assert len(first) == actors, f"{len(first)} actors worked, not {actors}"
    begin, end = max(first.values()), min(last.values())
    assert end > begin, "an actor was done before another had begun; give them more shards"
    busy = sum(max(0.0, min(report["ended"], end) - max(report["began"], begin)) for report in reports)
    return busy / (actors * (end - begin))


@click.command()
@click.option("--actors", "sizes", default="1,2,4,8,16,32", show_default=True)
@click.option("--service", default=3.0, show_default=True, help="Seconds per shard; real shards take minutes.")
@click.option("--shards-an-actor", default=12, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path(__file__).parent / "results" / "scale.json")
def main(sizes: str, service: float, shards_an_actor: int, out: Path) -> None:
    curve = []
    for actors in (int(size) for size in sizes.split(",")):
        with pretended_gpus(actors):
            reports = simulate(actors, actors * shards_an_actor, service)
        assert sorted(report["shard"] for report in reports) == list(range(actors * shards_an_actor))
        taken = Counter(report["worker"] for report in reports)
        curve.append(
            {
                "actors": actors,
                "efficiency": round(efficiency(reports, actors), 4),
                "shards_per_second_steady": round(actors * efficiency(reports, actors) / service, 3),
                "shards_of_an_actor": [min(taken.values()), max(taken.values())],
            }
        )
        click.echo(json.dumps(curve[-1]))
        result = {
            "command": f"python benchmarks/scale.py --actors {sizes} --service {service:g}",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "load_average": [round(value, 1) for value in os.getloadavg()],
            "versions": {"ray": version("ray")},
            "code": code_revision(),
            "service_seconds": service,
            "curve": curve,
        }
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
