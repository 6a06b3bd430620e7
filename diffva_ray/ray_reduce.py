"""Scoring on a cluster: one Ray task per shard; rows come back in shard order, as from one loop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray

from diffva_ray.evaluate.records import Boxes, Row
from diffva_ray.evaluate.scores import score_records
from diffva_ray.generate.plan import Run, open_run
from diffva_ray.storage import open_store

if TYPE_CHECKING:
    from diffva_ray.evaluate.reduction import Scored  # loads torch, which these tasks have no use for


@ray.remote(num_cpus=1)
def _score_shard(run: str, data: str, rows: list[Row], boxes: Boxes) -> Scored:
    opened = open_run(open_store(run))
    assert opened is not None
    return score_records(opened, open_store(data), rows, boxes)


def score(run: Run, data: str, groups: list[list[Row]], boxes: Boxes) -> list[Scored]:
    """``evaluate.reduction.Score`` on the connected cluster."""
    root: Any = run.about["data_root"]
    shared = ray.put(boxes)
    return ray.get([_score_shard.remote(run.store.uri, root, rows, shared) for rows in groups])
