"""Generation on a cluster: one Ray Data row is one planned shard, one actor holds one pipeline.

Workers commit their own shards; what comes back to the driver is a report of a few numbers. All state is in the run
folder, so a lost driver, node or cluster costs the shards in flight and nothing else. Ray restarts an actor whose
process died and gives it the same shard again, without end; ``generate/attempts.py`` is what ends it.
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
from diffva_ray.generate.attempts import MOST_MEMORY, RAY, Attempt, OutOfMemory, Session
from diffva_ray.progress import LOG
from diffva_ray.storage.store import patiently

START_DEATHS = 3  # actors in a row that may be lost while they start (a spot node, memory) before the run gives up


class ShardWorker:
    """An actor of the pool: opens its workbench once, then runs shard after shard."""

    def __init__(self, run: str, data: str, model: str, device: str, driver: str) -> None:
        from diffva_ray.generate import shard  # here, since it loads torch, which a driver has no use for

        node = ray.get_runtime_context().get_node_id()
        self.run_shard = shard.run_shard
        session = Session(RAY, driver, node, _alive)
        self.context = patiently(lambda: shard.WorkerContext.open(run, data, model, device, session))
        self.metrics = GenerationMetrics(run)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        reports = [self._run(int(shard)) for shard in batch["shard"]]
        return {key: [report[key] for report in reports] for key in ("shard", "records", "ok")}

    def _run(self, shard: int) -> dict[str, Any]:
        self.metrics.begin()
        try:
            report = self.run_shard(self.context, shard)
        except OutOfMemory:
            if Attempt(self.context.run.store, shard, self.context.session).short_of_memory >= MOST_MEMORY:
                raise
            os._exit(1)  # what the process holds on the device is not to be trusted any more; Ray starts a clean one
        self.metrics.commit(report)
        return report


def _alive(node: str) -> bool:
    return any(about["NodeID"] == node and about["Alive"] for about in ray.nodes())


def generate(
    run: str,
    data: str,
    model: str,
    pending: list[int],
    on_shard: Callable[[dict[str, int]], None],
    actors: int | None = None,
    gpus_per_actor: float | None = None,
    worker: type = ShardWorker,
) -> None:
    """Run the ``pending`` shards on an actor pool; ``on_shard`` is called as each is committed.

    By default one actor for each GPU (one GPU each), more as an autoscaling cluster grows; one for each CPU where the
    cluster has no GPU. ``worker`` is a class with ShardWorker's constructor and call: a simulator's, say.
    """
    share = gpus_per_actor
    if share is None:
        share = 1.0 if session.gpus() else 0.0
    if LOG.level > logging.DEBUG:
        session.quieten()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_consecutive_actor_init_deaths = START_DEATHS
    shards = ray.data.from_items([{"shard": shard} for shard in pending], override_num_blocks=len(pending))
    reports = shards.map_batches(
        worker,
        batch_size=1,
        compute=_pool(actors, share, len(pending)),
        num_gpus=share or None,
        num_cpus=0,  # with a CPU each, the actors of a small machine starve Ray Data's own tasks
        fn_constructor_args=(run, data, model, "cuda" if share else "cpu", secrets.token_hex(6)),
    )
    for report in reports.iter_rows():
        on_shard(report)


def _pool(actors: int | None, share: float, pending: int) -> ray.data.ActorPoolStrategy:
    """So many actors; by default those that the cluster has room for now and, on GPUs, up to one for each shard: Ray
    Data adds an actor only where there is a free GPU, and asks an autoscaling cluster for nodes while all are busy."""
    now = actors or (int(session.gpus() / share) if share else session.cpus())
    least = max(1, min(now, pending))
    most = pending if actors is None and share else least
    return ray.data.ActorPoolStrategy(min_size=least, max_size=most, max_tasks_in_flight_per_actor=2)
