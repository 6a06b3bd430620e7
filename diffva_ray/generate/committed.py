"""Reads the committed records of a run, with the records of its retries merged in.

A retry is a run of its own below ``overlays/``, with the same settings and the records that were quarantined. Its rows
replace the first ones wherever the run is read; committed parts are never changed.
"""

from __future__ import annotations

import io
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from diffva_ray.generate.plan import cut_again
from diffva_ray.generate.run import DamagedPart, PlanError, Run, find_run, part, start_run
from diffva_ray.generate.run_json import OVERLAYS as OVERLAYS  # the readers of a run name it, too
from diffva_ray.generate.run_json import RUN, DamagedRun, repair_command
from diffva_ray.progress import one_line
from diffva_ray.provenance import now
from diffva_ray.schema import PLAN, PathColumn, Status
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import join

PATHS: tuple[PathColumn, ...] = get_args(PathColumn)
READAHEAD_PARTS = 64


def overlays(run: Run) -> list[Run]:
    """The retry runs of a run, oldest first. Raises DamagedRun for one without a sound ``run.json``."""
    retries, damage = sound_overlays(run)
    if damage is not None:
        raise damage
    return retries


def sound_overlays(run: Run) -> tuple[list[Run], DamagedRun | None]:
    """The retry runs before the first one whose ``run.json`` is damaged or lost, and what is wrong with that one."""
    retries: list[Run] = []
    while True:
        store = open_store(overlay_uri(run, len(retries) + 1))
        try:
            retry = find_run(store)
        except DamagedRun as damage:
            return retries, damage
        if retry is None:
            lost = DamagedRun(f"{store.uri}/{RUN} is missing; {repair_command(store)}")
            return retries, lost if store.list("records") else None
        retries.append(retry)


def overlay_uri(run: Run, number: int) -> str:
    """The address of a retry run, counted from 1."""
    return join(run.store.uri, OVERLAYS, f"r{number}")


def committed(run: Run, columns: Sequence[str] | None = None, retries: Sequence[Run] | None = None) -> pa.Table:
    """All committed records in plan order, each once; a retried record has the row of its last retry.

    Paths are relative to ``run``. ``columns``: None for all. ``retries``: None for all of ``overlays``. For
    millions of records use ``parts``. Raises DamagedPart.
    """
    names = list(columns) if columns is not None else run.records_schema.names
    tables = [table for _, table in parts(run, names, retries)]
    return pa.concat_tables(tables) if tables else _schema(run, names).empty_table()


def parts(
    run: Run, columns: Sequence[str], retries: Sequence[Run] | None = None, shards: Container[int] | None = None
) -> Iterator[tuple[int, pa.Table]]:
    """Yields the committed records of each shard, as in ``committed``: (number of the shard, ``columns``).

    ``shards``: None for all. Memory holds a few shards and all retried records."""
    names = list(columns)
    wanted = [*names, *(["record_id"] if "record_id" not in names else [])]
    retried, row_of = _retried(run, overlays(run) if retries is None else retries, wanted)
    for shard, table in _read_parts(run, wanted, shards):
        if row_of:
            replacements = [row_of.get(record, -1) for record in table["record_id"].to_pylist()]
            table = _merge(table, np.array(replacements, np.int64), retried)
        yield shard, table.select(names)


def _retried(run: Run, retries: Sequence[Run], columns: list[str]) -> tuple[pa.Table, dict[str, int]]:
    """The records of all retries, and the row of each record's last retry by record id."""
    row_of: dict[str, int] = {}
    tables = [_schema(run, columns).empty_table()]
    for number, retry in enumerate(retries, start=1):
        for _, table in _read_parts(retry, columns):
            for name in set(PATHS) & set(columns):
                column = pc.binary_join_element_wise(f"{OVERLAYS}/r{number}", table[name], "/")
                table = table.set_column(table.column_names.index(name), name, column)
            start = sum(map(len, tables))
            row_of |= {record: start + row for row, record in enumerate(table["record_id"].to_pylist())}
            tables.append(table)
    return pa.concat_tables(tables), row_of


def _read_parts(run: Run, columns: list[str], wanted: Container[int] | None = None) -> Iterator[tuple[int, pa.Table]]:
    """Yields ``columns`` of the committed parts in order; READAHEAD_PARTS are read at a time."""

    def read(shard: int) -> tuple[int, pa.Table]:
        path = f"records/{part(shard)}.parquet"
        try:
            file = pq.ParquetFile(io.BytesIO(run.store.read(path)))
            return shard, file.read(columns, use_threads=False).replace_schema_metadata(None)
        except (OSError, ValueError, pa.ArrowException) as error:
            reason = one_line(error, 120)
            raise DamagedPart(
                f"{run.store.uri}/{path} cannot be read ({reason}); {repair_command(run.store)}"
            ) from error

    shards = [shard for shard in sorted(run.done()) if shard < run.shards and (wanted is None or shard in wanted)]
    with ThreadPoolExecutor(8) as pool:
        for start in range(0, len(shards), READAHEAD_PARTS):
            yield from pool.map(read, shards[start : start + READAHEAD_PARTS])


def _merge(table: pa.Table, replacements: NDArray[np.int64], retried: pa.Table) -> pa.Table:
    """Replace row n of ``table`` by row ``replacements[n]`` of ``retried``, where that is not negative."""
    hits = np.flatnonzero(replacements >= 0)
    if not len(hits):
        return table
    rows = np.arange(len(table))
    rows[hits] = len(table) + np.arange(len(hits))
    return pa.concat_tables([table, retried.take(replacements[hits])]).take(rows)


def _schema(run: Run, columns: list[str]) -> pa.Schema:
    return pa.schema([run.records_schema.field(name) for name in columns])


def start_retry(run: Run) -> Run | None:
    """The retry run to generate: an interrupted one, else a new one of all records that are quarantined now; None when
    there are none. Raises PlanError while the run itself has pending shards."""
    if run.pending():
        raise PlanError(f"{run.store.uri}: {len(run.pending())} shards are pending; finish diffva generate first")
    retries, _ = sound_overlays(run)  # the next one may have lost its run.json, which is written again below
    if retries and retries[-1].pending():
        if retries[-1].has_plan():
            return retries[-1]
        del retries[-1]  # its process ended before the plan was written, which is done again below
    records = committed(run, ["record_id", "status"], retries)
    quarantined = records.filter(pc.field("status") != Status.OK.value)["record_id"]
    if not len(quarantined):
        return None
    # plan the quarantined records again
    plan = run.plan()
    table = cut_again(plan.filter(pc.is_in(plan["record_id"], quarantined)), run.recipe.generate.shard_size)
    # a repaired file has another size, so the planned size does not count
    unknown = pa.array(np.full(len(table), -1, np.int64))
    table = table.set_column(PLAN.get_field_index("image_size"), PLAN.field("image_size"), unknown)
    store = open_store(overlay_uri(run, len(retries) + 1))
    # stored keys, without the defaults of this version: a retry has the fingerprint of its run
    return start_run(store, table, run.about["keys"], {**run.about, "started": now()})  # repaired images are newer
