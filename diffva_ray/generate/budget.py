"""How many records may be quarantined before a run counts as failed."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diffva_ray.generate.plan import Run, part
from diffva_ray.schema import Status


class OverBudget(Exception):
    """More records were quarantined than the recipe allows; all work is kept."""


def check_budget(run: Run) -> int:
    """Number of quarantined records so far. Raises OverBudget above ``max_quarantined_fraction`` of the plan."""
    columns = ["source_path", "status", "error"]
    found: list[pa.Table] = []
    for shard in sorted(run.done()):
        table = pq.read_table(io.BytesIO(run.store.read(f"records/{part(shard)}.parquet")), columns=columns)
        found.append(table.replace_schema_metadata(None).filter(pc.field("status") != Status.OK.value))
    bad = [row for table in found for row in table.to_pylist()]
    planned, allowed = run.about["records"], run.recipe.evaluate.max_quarantined_fraction
    if len(bad) > allowed * planned:
        raise OverBudget(
            f"{len(bad)} of {planned} records are quarantined, more than max_quarantined_fraction {allowed:g} allows "
            f"(first: {bad[0]['source_path']}: {bad[0]['error']}); all work is kept in {run.store.uri}"
        )
    return len(bad)
