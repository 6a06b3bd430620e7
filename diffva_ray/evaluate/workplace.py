"""Where the work of a reduce is done: here, one thing after the other. ``ray_reduce.Cluster`` spreads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffva_ray.evaluate.distances import Portion, embed_here
from diffva_ray.evaluate.options import Options
from diffva_ray.evaluate.records import Boxes, Row
from diffva_ray.evaluate.scores import score_records
from diffva_ray.generate.plan import Run
from diffva_ray.storage import open_store

if TYPE_CHECKING:  # it loads torch, which whoever only scores has no use for
    from diffva_ray.metrics.features import Extractor

Scored = tuple[list[Row], list[Row]]  # localisation rows and twin rows of one shard


class Workplace:
    """Tables do not depend on it."""

    def score(self, run: Run, data_uri: str, groups: list[list[Row]], boxes: Boxes) -> list[Scored]:
        """Localisation and twin rows of lists of records, in their order."""
        data = open_store(run.about["data_root"])
        return [score_records(run, data, group, boxes) for group in groups]

    def embed(self, run: Run, options: Options, extractor: Extractor, portions: Sequence[Portion]) -> None:
        """Write the features of images that have none stored."""
        embed_here(extractor, portions)
