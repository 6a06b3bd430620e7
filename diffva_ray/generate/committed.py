"""What a run has committed: the records of its parts, with those of later retries laid over them.

A retry is a run of its own below ``overlays/``: same settings, and the records that were quarantined. Its rows stand in
for the first ones wherever a run is read; committed parts are never edited.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from diffva_ray.generate.plan import cut_again
from diffva_ray.generate.run import PlanError, Run, find_run, part, start_run
from diffva_ray.schema import PLAN, RECORDS, Status
from diffva_ray.storage.store import join, open_store

OVERLAYS = "overlays"
PATHS = ("counterfactual_path", "attribution_path", "reconstruction_path")
AHEAD = 64  # parts read at a time


def overlays(run: Run) -> list[Run]:
    """The retries of a run, oldest first."""
    found: list[Run] = []
    while (overlay := find_run(open_store(join(run.store.uri, OVERLAYS, f"r{len(found) + 1}")))) is not None:
        found.append(overlay)
    return found


def committed(run: Run, columns: Sequence[str] | None = None) -> pa.Table:
    """All records that are committed, in plan order, each once: a retried one as its last retry left it.

    Paths are relative to ``run``. Without ``columns`` all of RECORDS. Millions of records want ``parts``.
    """
    names = list(columns) if columns is not None else RECORDS.names
    tables = [table for _, table in parts(run, names)]
    return pa.concat_tables(tables) if tables else _schema(names).empty_table()


def parts(run: Run, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    """The committed records shard by shard: the shard's number, and ``columns`` of its records in plan order, each as
    its last retry left it. Memory holds a few shards and what was retried."""
    names = list(columns)
    wanted = [*names, *(["record_id"] if "record_id" not in names else [])]
    retried, place = _retried(run, wanted)
    for shard, table in _read_parts(run, wanted):
        if place:
            found = [place.get(record, -1) for record in table["record_id"].to_pylist()]
            table = _lay_over(table, np.array(found, np.int64), retried)
        yield shard, table.select(names)


def _retried(run: Run, columns: list[str]) -> tuple[pa.Table, dict[str, int]]:
    """The records of all retries, and the place of each as the last one left it."""
    place: dict[str, int] = {}
    tables = [_schema(columns).empty_table()]
    for number, overlay in enumerate(overlays(run), start=1):
        for _, table in _read_parts(overlay, columns):
            for name in set(PATHS) & set(columns):
                column = pc.binary_join_element_wise(f"{OVERLAYS}/r{number}", table[name], "/")
                table = table.set_column(table.column_names.index(name), name, column)
            start = sum(map(len, tables))
            place |= {record: start + row for row, record in enumerate(table["record_id"].to_pylist())}
            tables.append(table)
    return pa.concat_tables(tables), place


def _read_parts(run: Run, columns: list[str]) -> Iterator[tuple[int, pa.Table]]:
    """Columns of the committed parts, in order; a few are read ahead."""

    def read(shard: int) -> tuple[int, pa.Table]:
        file = pq.ParquetFile(io.BytesIO(run.store.read(f"records/{part(shard)}.parquet")))
        return shard, file.read(columns, use_threads=False).replace_schema_metadata(None)

    shards = [shard for shard in sorted(run.done()) if shard < run.shards]
    with ThreadPoolExecutor(8) as pool:
        for start in range(0, len(shards), AHEAD):
            yield from pool.map(read, shards[start : start + AHEAD])


def _lay_over(table: pa.Table, found: NDArray[np.int64], retried: pa.Table) -> pa.Table:
    """``table`` with row ``found[n]`` of ``retried`` in the place of row n, where that is not negative."""
    hits = np.flatnonzero(found >= 0)
    if not len(hits):
        return table
    rows = np.arange(len(table))
    rows[hits] = len(table) + np.arange(len(hits))
    return pa.concat_tables([table, retried.take(found[hits])]).take(rows)


def _schema(columns: list[str]) -> pa.Schema:
    return pa.schema([RECORDS.field(name) for name in columns])


def start_retry(run: Run) -> Run | None:
    """The retry to work on: one that was interrupted, else a new one of all records that are quarantined now; None
    when there are none. Raises PlanError while the run itself is not finished."""
    if run.pending():
        raise PlanError(f"{run.store.uri}: {len(run.pending())} shards are pending; finish diffva generate first")
    before = overlays(run)
    if before and before[-1].pending():
        return before[-1]
    records = committed(run, ["record_id", "status"])
    quarantined = records.filter(pc.field("status") != Status.OK.value)["record_id"]
    if not len(quarantined):
        return None
    plan = run.plan()
    table = cut_again(plan.filter(pc.is_in(plan["record_id"], quarantined)), run.recipe.generate.shard_size)
    # a file that was mended has another size: what is read now is what counts
    unknown = pa.array(np.full(len(table), -1, np.int64))
    table = table.set_column(PLAN.get_field_index("image_size"), PLAN.field("image_size"), unknown)
    store = open_store(join(run.store.uri, OVERLAYS, f"r{len(before) + 1}"))
    # the keys as they are stored, without today's defaults: a retry has its run's own fingerprint
    return start_run(store, table, run.about["keys"], run.about)
