"""Generation on a cluster: one Ray Data row is one planned shard, and one actor holds one pipeline.

Workers commit their own shards and return a report of a few numbers to the driver. All state is in the run folder, so
the loss of a driver, node or cluster costs only the shards in flight. Ray restarts an actor whose process died and
gives it the same shard again, without limit; ``generate/attempts.py`` sets the limit.
"""

from __future__ import annotations

import inspect
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
import ray.data

from diffva_ray.distributed import session
from diffva_ray.distributed.accelerators import RESOURCE, one_type
from diffva_ray.distributed.failing_gpus import MAX_GPU_ERRORS, errors, note_error, own_gpu
from diffva_ray.distributed.prometheus import GenerationMetrics
from diffva_ray.generate.attempts import (
    MAX_MEMORY_FAILURES,
    MAX_SHARD_GPU_ERRORS,
    RAY,
    Attempt,
    GpuFailed,
    OutOfMemory,
    Session,
)
from diffva_ray.generate.run import part
from diffva_ray.progress import LOG
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import patiently

MAX_START_DEATHS = 3  # consecutive actors that may die while they start (spot node, memory) before the run fails
KEPT = "All committed work is kept; the same command continues the run"
SHARDS_AT_ONCE = 2  # per actor: one uses the GPU while the other reads its images, or stores and commits its results
REFUSAL_PAUSE = 30.0  # seconds for which an actor on a failed GPU keeps a shard, so that others take the next ones


class ShardWorker:
    """Actor of the pool: opens model, data and run once, then runs shards, or refuses them on a failed GPU. Ray calls
    it for SHARDS_AT_ONCE shards from as many threads."""

    def __init__(self, run: str, data: str, model: str, device: str, driver: str, allowed: bool = False) -> None:
        from diffva_ray.generate import shard  # imported here because it loads torch, which the driver does not need

        self.run_shard, self.store, self.driver = shard.run_shard, open_store(run), driver
        self.gpu, self.refusal = own_gpu(), ""
        if errors(self.store, driver, self.gpu) >= MAX_GPU_ERRORS:
            self.refusal = f"{self.gpu} failed {MAX_GPU_ERRORS} times"
            return
        attempts = Session(RAY, driver, self.gpu.node, _is_alive)
        try:
            self.context = patiently(lambda: self.opened(run, data, model, device, attempts, allowed))
        except GpuFailed as error:
            self.refusal = f"{self.gpu}: {error}"
            note_error(self.store, driver, self.gpu, self.refusal)
        self.metrics = GenerationMetrics(run)

    def opened(self, *arguments: Any) -> Any:
        """Load model, data and run."""
        from diffva_ray.generate.worker import WorkerContext

        return WorkerContext.open(*arguments)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        reports = [self._run(int(shard)) for shard in batch["shard"]]
        return {key: [report[key] for report in reports] for key in ("shard", "records", "ok", "refused", "gpu")}

    def _run(self, shard: int) -> dict[str, Any]:
        report = {"shard": shard, "records": 0, "ok": 0, "refused": "", "gpu": ""}
        if self.refusal:
            time.sleep(REFUSAL_PAUSE)
            return {**report, "refused": self.refusal, "gpu": f"{self.gpu.node} {self.gpu.number}"}
        if Attempt(self.store, shard, self.context.session).gpu_errors >= MAX_SHARD_GPU_ERRORS:
            return {**report, "refused": f"{part(shard)}: {MAX_SHARD_GPU_ERRORS} attempts ended with an error of a GPU"}
        self.metrics.begin()
        try:
            report |= self.run_shard(self.context, shard)
        except GpuFailed as error:
            LOG.warning("%s: %s", self.gpu, error)
            note_error(self.store, self.driver, self.gpu, str(error))
            os._exit(1)  # this process cannot use the GPU any more; Ray starts a new one
        except OutOfMemory:
            if Attempt(self.store, shard, self.context.session).short_of_memory >= MAX_MEMORY_FAILURES:
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
    accelerator_type: str | None = None,
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
        accelerator_type: Type of GPU, as Ray names it ("A100"); by default the most numerous one of the cluster.

    Raises:
        GpuFailed: No GPU is left, or the attempts at a shard ended with an error of a GPU.
    """
    gpus = gpus_per_actor
    if gpus is None:
        gpus = 1.0 if session.gpus() else 0.0
    kind, number = one_type(accelerator_type) if gpus else (None, 0)

    # Configure Ray Data.
    if LOG.level > logging.DEBUG:
        session.set_log_level()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.max_consecutive_actor_init_deaths = MAX_START_DEATHS
    context.execution_no_progress_timeout_s = -1  # a shard or the wait for a node may take longer than Ray's 30 min
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0  # an actor with SHARDS_AT_ONCE shards is busy

    arguments = (run, data, model, "cuda" if gpus else "cpu", secrets.token_hex(6), allow_environment_change)
    failed, given_up = dict[str, str](), list[str]()
    while pending:
        refused = list[int]()
        for report in _reports(worker, arguments, pending, _pool(actors, gpus, number, len(pending)), gpus, kind):
            if not report.get("refused"):
                on_shard(report)
            elif not report["gpu"]:
                given_up.append(report["refused"])
            else:
                refused.append(report["shard"])
                if report["gpu"] not in failed:
                    failed[report["gpu"]] = report["refused"]
                    LOG.warning("%s; the run goes on without it", report["refused"])
                if len(failed) >= max(1, one_type(kind)[1]):
                    raise GpuFailed(f"no GPU is left: {'; '.join(failed.values())}. {KEPT}")
        pending = refused
    if given_up:
        raise GpuFailed(f"{'; '.join(given_up)}. The other shards are done. {KEPT}")


def _reports(
    worker: type, arguments: tuple[Any, ...], pending: list[int], pool: ray.data.ActorPoolStrategy, gpus: float,
    kind: str | None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Run the ``pending`` shards on a pool of actors, with ``gpus`` of type ``kind`` each; yields the report of each
    shard."""
    # One row and one block for each shard.
    shards = ray.data.from_items([{"shard": shard} for shard in pending], override_num_blocks=len(pending))
    options = _calls_at_once(of_pool=False) | ({"accelerator_type": kind} if kind else {})
    reports = shards.map_batches(
        worker,
        batch_size=1,
        compute=pool,
        num_gpus=gpus or None,
        num_cpus=0,  # on a small machine, actors with one CPU each would starve Ray Data's own tasks
        fn_constructor_args=arguments,
        **options,
    )
    reported = list[int]()
    needed = {"GPU": gpus, **({f"{RESOURCE}{kind}": 0.001} if kind else {})} if gpus else {"CPU": 1.0}
    with session.waiting("the first shard", needed, lambda: bool(reported)):
        for report in reports.iter_rows():
            reported.append(report["shard"])
            yield report


def _pool(actors: int | None, gpus: float, number: int, pending: int) -> ray.data.ActorPoolStrategy:
    """Pool of ``actors`` actors. By default it starts with as many as the cluster has room for (it has ``number`` GPUs
    of the type in use) and, on GPUs, grows up to one for each shard: Ray Data adds an actor only for a free GPU, and
    requests nodes from an autoscaling cluster while all actors are busy."""
    wanted = actors or (int(number / gpus) if gpus else session.cpus())
    min_size = max(1, min(wanted, pending))
    max_size = pending if actors is None and gpus else min_size
    return ray.data.ActorPoolStrategy(
        min_size=min_size,
        max_size=max_size,
        max_tasks_in_flight_per_actor=SHARDS_AT_ONCE,
        enable_true_multi_threading=True,
        **_calls_at_once(of_pool=True),
    )


def _calls_at_once(of_pool: bool) -> dict[str, Any]:
    """The argument for SHARDS_AT_ONCE calls of an actor: of the pool where Ray has one (2.60), else of the actor."""
    named = "max_concurrent_calls_per_actor"
    has_it = named in inspect.signature(ray.data.ActorPoolStrategy).parameters
    return {named if has_it else "max_concurrency": SHARDS_AT_ONCE} if of_pool == has_it else {}
