"""Generation on a cluster: one Ray Data row is one planned shard, and one actor holds one pipeline.

Workers commit their own shards and return a report of a few numbers to the driver. All state is in the run folder, so
the loss of a driver, node or cluster costs only the shards in flight. Ray restarts an actor whose process died and
gives it the same shard again, without limit; ``generate/attempts.py`` sets the limit.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable
from typing import Any

import ray
import ray.data

from diffva_ray.distributed import session
from diffva_ray.distributed.prometheus import GenerationMetrics
from diffva_ray.generate.attempts import MAX_MEMORY_FAILURES, RAY, Attempt, OutOfMemory, Session
from diffva_ray.progress import LOG
from diffva_ray.storage.store import patiently

MAX_START_DEATHS = 3  # consecutive actors that may die while they start (spot node, memory) before the run fails


class ShardWorker:
    """Actor of the pool: opens model, data and run once, then runs shard after shard."""

    def __init__(self, run: str, data: str, model: str, device: str, driver: str, allowed: bool = False) -> None:
        from diffva_ray.generate import shard  # imported here because it loads torch, which the driver does not need

        node = ray.get_runtime_context().get_node_id()
        self.run_shard = shard.run_shard
        attempts = Session(RAY, driver, node, _is_alive)
        self.context = patiently(lambda: shard.WorkerContext.open(run, data, model, device, attempts, allowed))
        self.metrics = GenerationMetrics(run)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        reports = [self._run(int(shard)) for shard in batch["shard"]]
        return {key: [report[key] for report in reports] for key in ("shard", "records", "ok")}

    def _run(self, shard: int) -> dict[str, Any]:
        self.metrics.begin()
        try:
            report = self.run_shard(self.context, shard)
        except OutOfMemory:
            if Attempt(self.context.run.store, shard, self.context.session).short_of_memory >= MAX_MEMORY_FAILURES:
                raise
            os._exit(1)  # the device memory of this process may be in a bad state; Ray starts a new process
        self.metrics.commit(report)
        return report


def _is_alive(node_id: str) -> bool:
    return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())


def generate(
    run: str,
    data: str,
    model: str,
    pending: list[int],
    on_shard: Callable[[dict[str, int]], None],
    actors: int | None = None,
    gpus_per_actor: float | None = None,
    worker: type = ShardWorker,
    allow_environment_change: bool = False,
) -> None:
    """Run the ``pending`` shards of a run on an actor pool.

    Args:
        run: Address of the run.
        data: Address of the images.
        model: Address of the model folder.
        pending: Shard numbers.
        on_shard: Called with the report (``shard``, ``records``, ``ok``) of each committed shard.
        actors: Number of actors. By default one for each GPU, more as an autoscaling cluster grows, or one for each
            CPU if the cluster has no GPU.
        gpus_per_actor: GPUs, or a fraction of one, for each actor; by default 1 if the cluster has GPUs, otherwise 0.
        worker: Class with the constructor and call of ``ShardWorker``; a simulator can replace it.
        allow_environment_change: Whether workers may have another device than the run's first worker.
    """
    gpus = gpus_per_actor
    if gpus is None:
        gpus = 1.0 if session.gpus() else 0.0

    # Configure Ray Data.
    if LOG.level > logging.DEBUG:
        session.set_log_level()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_consecutive_actor_init_deaths = MAX_START_DEATHS
    context.execution_no_progress_timeout_s = -1  # a shard or the wait for a node may take longer than Ray's 30 min

    # One row and one block for each shard.
    shards = ray.data.from_items([{"shard": shard} for shard in pending], override_num_blocks=len(pending))
    reports = shards.map_batches(
        worker,
        batch_size=1,
        compute=_pool(actors, gpus, len(pending)),
        num_gpus=gpus or None,
        num_cpus=0,  # on a small machine, actors with one CPU each would starve Ray Data's own tasks
        fn_constructor_args=(
            run,
            data,
            model,
            "cuda" if gpus else "cpu",
            secrets.token_hex(6),
            allow_environment_change,
        ),
    )
    reported = list[int]()
    with session.waiting("the first shard", {"GPU": gpus} if gpus else {"CPU": 1}, lambda: bool(reported)):
        for report in reports.iter_rows():
            reported.append(report["shard"])
            on_shard(report)


def _pool(actors: int | None, gpus: float, pending: int) -> ray.data.ActorPoolStrategy:
    """Pool of ``actors`` actors. By default it starts with as many as the cluster has room for and, on GPUs, grows up
    to one for each shard: Ray Data adds an actor only for a free GPU, and requests nodes from an autoscaling cluster
    while all actors are busy."""
    wanted = actors or (int(session.gpus() / gpus) if gpus else session.cpus())
    min_size = max(1, min(wanted, pending))
    max_size = pending if actors is None and gpus else min_size
    return ray.data.ActorPoolStrategy(min_size=min_size, max_size=max_size, max_tasks_in_flight_per_actor=2)
