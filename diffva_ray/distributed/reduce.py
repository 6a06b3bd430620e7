"""Reduce on a cluster: one Ray task scores a shard, actors that hold an extractor compute features where none are
stored. Rows come back in shard order and features through files, so tables are those of one loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.util import ActorPool

from diffva_ray.distributed import session
from diffva_ray.evaluate.distances import FeatureChunk, embed_here
from diffva_ray.evaluate.executor import Ids, LocalExecutor, Scores, score_shard
from diffva_ray.evaluate.options import Options
from diffva_ray.evaluate.records import Boxes
from diffva_ray.evaluate.run_index import Setting, ShardRef
from diffva_ray.generate.run import Run, find_run
from diffva_ray.storage.store import open_store

if TYPE_CHECKING:  # it loads torch, which tasks that score have no use for
    from diffva_ray.metrics.features import Extractor


WAITING = 512  # tasks that are asked for at a time


@ray.remote(num_cpus=1)
def _score_shard(run: str, home: ShardRef, ids: Ids, boxes: Boxes, settings: Mapping[Setting, str]) -> Scores:
    found = find_run(open_store(run))
    assert found is not None
    return score_shard(found, home, ids, boxes, settings)


class Embedder:
    """An actor with one extractor on its device."""

    def __init__(self, run: str, options: Options, asked: str, device: str) -> None:
        from diffva_ray.evaluate.set_distances import open_extractor

        opened = find_run(open_store(run))
        assert opened is not None
        self.open = lambda: open_extractor(asked, opened, options, device)
        self.extractor: Extractor | None = None

    def fill(self, chunk: FeatureChunk) -> None:
        if self.extractor is None:  # not before: an actor's own start fails without a reason that a driver could tell
            self.extractor = self.open()
        chunk.fill(self.extractor)


class RayExecutor(LocalExecutor):
    """The work of a reduce on the connected cluster."""

    def score(
        self, run: Run, homes: Mapping[ShardRef, Ids], boxes: Boxes, settings: Mapping[Setting, str]
    ) -> Iterator[Scores]:
        shared, waiting = ray.put(boxes), deque[Any]()
        for home, ids in homes.items():
            waiting.append(_score_shard.remote(run.store.uri, home, ids, shared, settings))
            if len(waiting) == WAITING:
                yield ray.get(waiting.popleft())
        yield from map(ray.get, waiting)

    def embed(self, run: Run, options: Options, extractor: Extractor, chunks: Sequence[FeatureChunk]) -> None:
        """One actor for each GPU, or for each CPU where there is none. A single chunk is computed here: it takes
        less than an actor takes to start."""
        if len(chunks) < 2:
            return embed_here(extractor, chunks)
        gpus = int(session.gpus())
        actors = min(gpus or session.cpus(), len(chunks))
        needs: dict[str, Any] = {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": 1}
        actor = ray.remote(Embedder).options(max_restarts=-1, max_task_retries=-1, **needs)
        made = [actor.remote(run.store.uri, options, extractor.asked, "cuda" if gpus else "cpu") for _ in range(actors)]
        try:
            for _ in ActorPool(made).map_unordered(lambda one, chunk: one.fill.remote(chunk), list(chunks)):
                pass
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None  # OSError, UnusableData: as from a loop
        return None
