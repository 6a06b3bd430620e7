"""Runs the work of a reduce in this process; ``distributed.reduce.RayExecutor`` runs it on a cluster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from diffva_ray.evaluate.baselines import Baselines
from diffva_ray.evaluate.distances import FeatureChunk, embed_here
from diffva_ray.evaluate.options import Options
from diffva_ray.evaluate.records import Lesions, setting_key, stored_records
from diffva_ray.evaluate.run_index import SettingKey, ShardRef
from diffva_ray.evaluate.scores import LocalizationScores, narrow, score_records
from diffva_ray.generate.run import Run

if TYPE_CHECKING:  # loads torch, which scoring does not need
    from diffva_ray.metrics.features import Extractor

Ids = NDArray[np.bytes_]  # record ids of one shard
Scores = tuple[LocalizationScores, pd.DataFrame]  # localisation; similarity to the ground-truth counterfactual


class LocalExecutor:
    """Runs the parts of a reduce in this process. Subclasses use other processes; the tables are the same."""

    def score(
        self,
        run: Run,
        shards_of: Mapping[ShardRef, Ids],
        lesions: Lesions,
        baselines: Baselines | None,
        settings: Mapping[SettingKey, str],
    ) -> Iterable[Scores]:
        """Score the records of shards, in their order. ``settings``: names of a run's settings."""
        return (score_shard(run, shard_ref, ids, lesions, baselines, settings) for shard_ref, ids in shards_of.items())

    def embed(self, run: Run, options: Options, extractor: Extractor, chunks: Sequence[FeatureChunk]) -> None:
        """Compute and store the missing features."""
        embed_here(extractor, chunks)


def score_shard(
    run: Run,
    shard_ref: ShardRef,
    ids: Ids,
    lesions: Lesions,
    baselines: Baselines | None,
    settings: Mapping[SettingKey, str],
) -> Scores:
    """Score the records ``ids`` of one shard whose lesions are known; others were replaced by a retry."""
    wanted = set(ids.astype(str))
    rows = [row for row in stored_records(run, shard_ref) if row["record_id"] in wanted]
    unread = set[str]()
    localization, ground_truth = score_records(run, rows, lesions, baselines, unread)
    if len(settings) > 1:
        names = {row["record_id"]: settings[setting_key(row)] for row in rows}
        for row in (*localization, *ground_truth):
            row["setting"] = names[row["record_id"]]
    return LocalizationScores.of(localization, unread), narrow(pd.DataFrame(ground_truth))
