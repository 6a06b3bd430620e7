"""How many records may be quarantined before a run counts as failed, and when going on makes no sense."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow.compute as pc

from diffva_ray.generate.ledger import committed
from diffva_ray.generate.plan import Run
from diffva_ray.schema import Status

FIRST_SHARDS = 3  # when none of their records is usable, it is the folder, the mount or the model


class OverBudget(Exception):
    """More records were quarantined than the recipe allows; all work is kept."""


def check_budget(run: Run) -> int:
    """Number of quarantined records so far. Raises OverBudget above ``max_quarantined_fraction`` of the plan."""
    records = committed(run, ["source_path", "status", "error"])
    bad = records.filter(pc.field("status") != Status.OK.value)
    planned, allowed = run.about["records"], run.recipe.evaluate.max_quarantined_fraction
    if len(bad) > allowed * planned:
        raise OverBudget(
            f"{len(bad)} of {planned} records are quarantined, more than max_quarantined_fraction {allowed:g} allows "
            f"({_first(bad.slice(0, 1).to_pylist()[0])}); all work is kept in {run.store.uri}; mend the films and run "
            f"diffva retry"
        )
    return len(bad)


def check_first_shards(run: Run, counts: Mapping[str, int]) -> None:
    """Stop early: OverBudget when the first shards made now hold records, and none that is ok."""
    if counts["shards"] == FIRST_SHARDS < run.shards and counts["records"] and not counts["ok"]:
        bad = committed(run, ["source_path", "status", "error"]).filter(pc.field("status") != Status.OK.value)
        raise OverBudget(
            f"none of the first {counts['records']} records is usable ({_first(bad.slice(0, 1).to_pylist()[0])}); "
            f"stopped, because that looks like a wrong folder or a lost mount. Make {run.about['data_root']} readable "
            f"and go on with the same command, then diffva retry {run.store.uri}"
        )


def _first(row: Mapping[str, str]) -> str:
    return f"first: {row['source_path']}: {row['error']}"
