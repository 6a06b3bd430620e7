"""Where the work of a reduce is done: here, one thing after the other. ``ray_reduce.Cluster`` spreads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from diffva_ray.evaluate.distances import Portion, embed_here
from diffva_ray.evaluate.options import Options
from diffva_ray.evaluate.records import Boxes, stored_records
from diffva_ray.evaluate.run_index import Home, Setting
from diffva_ray.evaluate.scores import Places, narrow, score_records
from diffva_ray.generate.plan import SWEPT
from diffva_ray.generate.run import Run

if TYPE_CHECKING:  # it loads torch, which whoever only scores has no use for
    from diffva_ray.metrics.features import Extractor

Ids = NDArray[np.bytes_]  # of the records that a home holds
Scores = tuple[Places, pd.DataFrame]  # localisation, and closeness to the lesion-free twins


class Workplace:
    """Runs the parts of a reduce in this process. Subclasses spread them over others; the tables are the same."""

    def score(
        self, run: Run, homes: Mapping[Home, Ids], boxes: Boxes, settings: Mapping[Setting, str]
    ) -> Iterable[Scores]:
        """The scores of what shards hold, in their order; ``settings`` are the names of a sweep's."""
        return (score_home(run, home, ids, boxes, settings) for home, ids in homes.items())

    def embed(self, run: Run, options: Options, extractor: Extractor, portions: Sequence[Portion]) -> None:
        """Write the features of images that have none stored."""
        embed_here(extractor, portions)


def score_home(run: Run, home: Home, ids: Ids, boxes: Boxes, settings: Mapping[Setting, str]) -> Scores:
    """Scores of those records of one shard that the run has taken from it, where their lesions are known."""
    taken = set(ids.astype(str))
    rows = [row for row in stored_records(run, home) if row["record_id"] in taken]
    unread = set[str]()
    places, twins = score_records(run, rows, boxes, unread)
    if len(settings) > 1:
        names = {row["record_id"]: settings[tuple(row[key] for key in SWEPT)] for row in rows}
        for row in (*places, *twins):
            row["setting"] = names[row["record_id"]]
    return Places.of(places, unread), narrow(pd.DataFrame(twins))
