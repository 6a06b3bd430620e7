"""How many records may be quarantined before a run counts as failed, and when going on makes no sense."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

from diffva_ray.generate.committed import parts
from diffva_ray.generate.run import Run
from diffva_ray.schema import RECORDS, Status

FIRST_SHARDS = 3  # when none of their records is usable, it is the folder, the mount or the model


class OverBudget(Exception):
    """More records were quarantined than the recipe allows; all work is kept."""


def check_budget(run: Run) -> None:
    """Raises OverBudget when more records are quarantined so far than ``max_quarantined_fraction`` of the plan."""
    check_quarantined(run, _quarantined(run))


def check_quarantined(run: Run, bad: pa.Table) -> None:
    """``check_budget`` where the quarantined records (``bad``, in plan order) have been read already."""
    planned, allowed = run.about["records"], run.recipe.evaluate.max_quarantined_fraction
    if len(bad) > allowed * planned:
        raise OverBudget(
            f"{len(bad)} of {planned} records are quarantined, more than max_quarantined_fraction {allowed:g} allows "
            f"({_first(bad)}); all work is kept in {run.store.uri}; mend the images and run diffva retry"
        )


def check_first_shards(run: Run, counts: Mapping[str, int]) -> None:
    """Stop early: OverBudget when the first shards made now hold records, and none that is ok."""
    if counts["shards"] == FIRST_SHARDS < run.shards and counts["records"] and not counts["ok"]:
        raise OverBudget(
            f"none of the first {counts['records']} records is usable ({_first(_quarantined(run))}); "
            f"stopped, because that looks like a wrong folder or a lost mount. Make {run.about['data_root']} readable "
            f"and go on with the same command, then diffva retry {run.store.uri}"
        )


def _quarantined(run: Run) -> pa.Table:
    names = ["image_path", "status", "error"]
    bad = [table.filter(pc.field("status") != Status.OK.value) for _, table in parts(run, names)]
    return pa.concat_tables(bad) if bad else RECORDS.empty_table()


def _first(bad: pa.Table) -> str:
    return f"first: {bad['image_path'][0]}: {bad['error'][0]}"
