"""Limits on the number of quarantined records: over a whole run, and over its first shards."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

from diffva_ray.generate.committed import parts
from diffva_ray.generate.run import SUCCESS, Run
from diffva_ray.generate.run_json import RUN
from diffva_ray.schema import RECORDS, Status

FIRST_SHARDS = 3  # without a usable record in them, the folder, the mount or the model is wrong


class TooManyQuarantined(Exception):
    """More records were quarantined than the recipe allows; all work is kept."""


def check_quarantine_limit(run: Run) -> None:
    """Raises TooManyQuarantined when more than ``max_quarantined_fraction`` of the planned records are quarantined."""
    check_quarantined(run, _quarantined(run))


def check_quarantined(run: Run, bad: pa.Table, reduced: bool = False) -> None:
    """``check_quarantine_limit`` for quarantined records that are already read (``bad``, in plan order); ``reduced``:
    the tables are written."""
    planned, allowed = run.about["records"], run.recipe.evaluate.max_quarantined_fraction
    if len(bad) > allowed * planned:
        enough = math.ceil(1000 * len(bad) / planned) / 1000
        kept = f"the tables are in {run.store.uri}/tables" if reduced else f"all work is kept in {run.store.uri}"
        raise TooManyQuarantined(
            f"{len(bad)} of {planned} records are quarantined, more than max_quarantined_fraction {allowed:g} allows "
            f"({_first(bad)}); {kept}; fix the images and run diffva retry, or accept the run with diffva reduce "
            f"--max-quarantined-fraction {enough:g}"
        )


def allow_quarantined(run: Run, fraction: float) -> Run:
    """Store another ``max_quarantined_fraction`` in ``run.json``, which asks for a new reduce; returns the new run."""
    if run.recipe.evaluate.max_quarantined_fraction == fraction:
        return run
    recipe = run.about["recipe"]
    evaluate = {**recipe.get("evaluate", {}), "max_quarantined_fraction": fraction}
    about = {**run.about, "recipe": {**recipe, "evaluate": evaluate}}
    run.store.delete(SUCCESS)
    run.store.put(RUN, json.dumps(about, indent=1).encode())
    return Run(run.store, about)


def check_first_shards(run: Run, counts: Mapping[str, int]) -> None:
    """Raises TooManyQuarantined when the first shards of this session hold records, but none with status ok."""
    if counts["shards"] == FIRST_SHARDS < run.shards and counts["records"] and not counts["ok"]:
        raise TooManyQuarantined(
            f"none of the first {counts['records']} records is usable ({_first(_quarantined(run))}); "
            f"stopped, because that looks like a wrong folder or a lost mount. Make {run.about['data_root']} readable, "
            f"give the same command again, then run diffva retry {shlex.quote(run.store.uri)}"
        )


def _quarantined(run: Run) -> pa.Table:
    names = ["image_path", "status", "error"]
    bad = [table.filter(pc.field("status") != Status.OK.value) for _, table in parts(run, names)]
    return pa.concat_tables(bad) if bad else RECORDS.empty_table()


def _first(bad: pa.Table) -> str:
    return f"first: {bad['image_path'][0]}: {bad['error'][0]}"
