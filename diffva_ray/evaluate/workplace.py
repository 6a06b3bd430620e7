"""Where the work of a reduce is done: here, one thing after the other. ``ray_reduce.Cluster`` spreads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from diffva_ray.evaluate.census import Home, Setting
from diffva_ray.evaluate.distances import Portion, embed_here
from diffva_ray.evaluate.options import Options
from diffva_ray.evaluate.records import Boxes, stored_records
from diffva_ray.evaluate.scores import Places, narrow, score_records
from diffva_ray.generate.plan import SWEPT, Run
from diffva_ray.storage import open_store

if TYPE_CHECKING:  # it loads torch, which whoever only scores has no use for
    from diffva_ray.metrics.features import Extractor

Scored = tuple[Places, pd.DataFrame]  # localisation, and closeness to the lesion-free twins


class Workplace:
    """Tables do not depend on it."""

    def score(self, run: Run, homes: Sequence[Home], boxes: Boxes, settings: Mapping[Setting, str]) -> Iterable[Scored]:
        """The scores of what shards hold, in their order; ``settings`` are the names of a sweep's."""
        return (score_home(run, home, boxes, settings) for home in homes)

    def embed(self, run: Run, options: Options, extractor: Extractor, portions: Sequence[Portion]) -> None:
        """Write the features of images that have none stored."""
        embed_here(extractor, portions)


def score_home(run: Run, home: Home, boxes: Boxes, settings: Mapping[Setting, str]) -> Scored:
    """Scores of the ``ok`` records of one shard whose lesions are known."""
    rows = stored_records(run, home)
    places, twins = score_records(run, open_store(run.about["data_root"]), rows, boxes)
    if len(settings) > 1:
        names = {row["record_id"]: settings[tuple(row[key] for key in SWEPT)] for row in rows}
        for row in (*places, *twins):
            row["setting"] = names[row["record_id"]]
    return Places.of(places), narrow(pd.DataFrame(twins))
