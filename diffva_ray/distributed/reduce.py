"""Reduce on a cluster: each Ray task scores one shard, and actors with an extractor compute missing features.

Rows come back in shard order and features through files, so the tables are the same as without Ray.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.util import ActorPool

from diffva_ray.distributed import session
from diffva_ray.distributed.accelerators import one_type
from diffva_ray.evaluate.baselines import Baselines
from diffva_ray.evaluate.distances import FeatureChunk, embed_here
from diffva_ray.evaluate.executor import Ids, LocalExecutor, Scores, score_shard
from diffva_ray.evaluate.options import Options
from diffva_ray.evaluate.records import Lesions
from diffva_ray.evaluate.run_index import SettingKey, ShardRef
from diffva_ray.generate.run import Run, find_run
from diffva_ray.storage.opening import open_store

if TYPE_CHECKING:  # it loads torch, which scoring tasks do not need
    from diffva_ray.metrics.features import Extractor

MAX_PENDING_TASKS = 512


@ray.remote(num_cpus=1)
def _score_shard(
    run: str,
    shard: ShardRef,
    ids: Ids,
    lesions: Lesions,
    baselines: Baselines | None,
    settings: Mapping[SettingKey, str],
) -> Scores:
    opened = find_run(open_store(run))
    assert opened is not None
    return score_shard(opened, shard, ids, lesions, baselines, settings)


class Embedder:
    """Actor with one extractor on its device."""

    def __init__(self, run: str, options: Options, extractor: str, device: str) -> None:
        from diffva_ray.evaluate.set_distances import open_extractor

        opened = find_run(open_store(run))
        assert opened is not None
        self.open: Callable[[], Extractor] = lambda: open_extractor(extractor, opened, options, device)
        self.extractor: Extractor | None = None

    def fill(self, chunk: FeatureChunk) -> None:
        """Compute and store the features of ``chunk``."""
        if self.extractor is None:  # not in the constructor: a failure there would reach the driver without its reason
            self.extractor = self.open()
        chunk.fill(self.extractor)


class RayExecutor(LocalExecutor):
    """Runs the work of a reduce on the connected cluster."""

    def score(
        self,
        run: Run,
        shards: Mapping[ShardRef, Ids],
        lesions: Lesions,
        baselines: Baselines | None,
        settings: Mapping[SettingKey, str],
    ) -> Iterator[Scores]:
        """Score one shard in each task; yield the scores in the order of ``shards``."""
        shared, pending = (ray.put(lesions), ray.put(baselines)), deque[Any]()
        for shard, ids in shards.items():
            pending.append(_score_shard.remote(run.store.uri, shard, ids, *shared, settings))
            if len(pending) == MAX_PENDING_TASKS:
                yield ray.get(pending.popleft())
        yield from map(ray.get, pending)

    def embed(self, run: Run, options: Options, extractor: Extractor, chunks: Sequence[FeatureChunk]) -> None:
        """Compute the features of ``chunks`` on one actor for each GPU, or for each CPU if there is no GPU. A single
        chunk is computed in this process, which takes less time than the start of an actor."""
        if len(chunks) < 2:
            return embed_here(extractor, chunks)
        kind, gpus = one_type()
        count = min(gpus or session.cpus(), len(chunks))
        resources: dict[str, Any] = {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": 1}
        resources |= {"accelerator_type": kind} if kind else {}
        actor = ray.remote(Embedder).options(max_restarts=-1, max_task_retries=-1, **resources)
        device = "cuda" if gpus else "cpu"
        pool = ActorPool([actor.remote(run.store.uri, options, extractor.asked, device) for _ in range(count)])
        try:
            for _ in pool.map_unordered(lambda embedder, chunk: embedder.fill.remote(chunk), list(chunks)):
                pass
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None  # the same OSError or UnusableData as without Ray
        return None
