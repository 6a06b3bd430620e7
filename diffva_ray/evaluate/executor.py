"""Where the work of a reduce is done: here, one thing after the other. ``ray_reduce.Cluster`` spreads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from diffva_ray.evaluate.distances import FeatureChunk, embed_here
from diffva_ray.evaluate.options import Options
from diffva_ray.evaluate.records import Boxes, stored_records
from diffva_ray.evaluate.run_index import Setting, ShardRef
from diffva_ray.evaluate.scores import LocalizationScores, narrow, score_records
from diffva_ray.generate.plan import SWEPT
from diffva_ray.generate.run import Run

if TYPE_CHECKING:  # it loads torch, which whoever only scores has no use for
    from diffva_ray.metrics.features import Extractor

Ids = NDArray[np.bytes_]  # of the records that a shard_ref holds
Scores = tuple[LocalizationScores, pd.DataFrame]  # localisation, and closeness to the ground-truth counterfactual


class LocalExecutor:
    """Runs the parts of a reduce in this process. Subclasses spread them over others; the tables are the same."""

    def score(
        self, run: Run, shards_of: Mapping[ShardRef, Ids], boxes: Boxes, settings: Mapping[Setting, str]
    ) -> Iterable[Scores]:
        """The scores of what shards hold, in their order; ``settings`` are the names of a sweep's."""
        return (score_shard(run, shard_ref, ids, boxes, settings) for shard_ref, ids in shards_of.items())

    def embed(self, run: Run, options: Options, extractor: Extractor, chunks: Sequence[FeatureChunk]) -> None:
        """Write the features of images that have none stored."""
        embed_here(extractor, chunks)


def score_shard(run: Run, shard_ref: ShardRef, ids: Ids, boxes: Boxes, settings: Mapping[Setting, str]) -> Scores:
    """Scores of those records of one shard that the run has taken from it, where their lesions are known."""
    taken = set(ids.astype(str))
    rows = [row for row in stored_records(run, shard_ref) if row["record_id"] in taken]
    unread = set[str]()
    localization, ground_truth = score_records(run, rows, boxes, unread)
    if len(settings) > 1:
        names = {row["record_id"]: settings[tuple(row[key] for key in SWEPT)] for row in rows}
        for row in (*localization, *ground_truth):
            row["setting"] = names[row["record_id"]]
    return LocalizationScores.of(localization, unread), narrow(pd.DataFrame(ground_truth))
