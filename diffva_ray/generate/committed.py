"""Reads the committed records of a run, with the records of its retries merged in.

A retry is a run of its own below ``overlays/``, with the same settings and the records that were quarantined. Its rows
replace the first ones wherever the run is read; committed parts are never changed.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from diffva_ray.generate.plan import cut_again
from diffva_ray.generate.run import PlanError, Run, find_run, part, start_run
from diffva_ray.schema import PLAN, RECORDS, Status
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import join

OVERLAYS = "overlays"
PathColumn = Literal["counterfactual_path", "attribution_path", "reconstruction_path"]
PATHS: tuple[PathColumn, ...] = get_args(PathColumn)
READAHEAD_PARTS = 64


def overlays(run: Run) -> list[Run]:
    """The retry runs of a run, oldest first."""
    retries: list[Run] = []
    while (retry := find_run(open_store(join(run.store.uri, OVERLAYS, f"r{len(retries) + 1}")))) is not None:
        retries.append(retry)
    return retries


def committed(run: Run, columns: Sequence[str] | None = None) -> pa.Table:
    """All committed records in plan order, each once; a retried record has the row of its last retry.

    Paths are relative to ``run``. ``columns``: None for all of RECORDS. For millions of records use ``parts``.
    """
    names = list(columns) if columns is not None else RECORDS.names
    tables = [table for _, table in parts(run, names)]
    return pa.concat_tables(tables) if tables else _schema(names).empty_table()


def parts(run: Run, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    """Yields the committed records of each shard, as in ``committed``: (number of the shard, ``columns``).

    Memory holds a few shards and all retried records."""
    names = list(columns)
    wanted = [*names, *(["record_id"] if "record_id" not in names else [])]
    retried, row_of = _retried(run, wanted)
    for shard, table in _read_parts(run, wanted):
        if row_of:
            replacements = [row_of.get(record, -1) for record in table["record_id"].to_pylist()]
            table = _merge(table, np.array(replacements, np.int64), retried)
        yield shard, table.select(names)


def _retried(run: Run, columns: list[str]) -> tuple[pa.Table, dict[str, int]]:
    """The records of all retries, and the row of each record's last retry by record id."""
    row_of: dict[str, int] = {}
    tables = [_schema(columns).empty_table()]
    for number, retry in enumerate(overlays(run), start=1):
        for _, table in _read_parts(retry, columns):
            for name in set(PATHS) & set(columns):
                column = pc.binary_join_element_wise(f"{OVERLAYS}/r{number}", table[name], "/")
                table = table.set_column(table.column_names.index(name), name, column)
            start = sum(map(len, tables))
            row_of |= {record: start + row for row, record in enumerate(table["record_id"].to_pylist())}
            tables.append(table)
    return pa.concat_tables(tables), row_of


def _read_parts(run: Run, columns: list[str]) -> Iterator[tuple[int, pa.Table]]:
    """Yields ``columns`` of the committed parts in order; READAHEAD_PARTS are read at a time."""

    def read(shard: int) -> tuple[int, pa.Table]:
        file = pq.ParquetFile(io.BytesIO(run.store.read(f"records/{part(shard)}.parquet")))
        return shard, file.read(columns, use_threads=False).replace_schema_metadata(None)

    shards = [shard for shard in sorted(run.done()) if shard < run.shards]
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


def _schema(columns: list[str]) -> pa.Schema:
    return pa.schema([RECORDS.field(name) for name in columns])


def start_retry(run: Run) -> Run | None:
    """The retry run to generate: an interrupted one, else a new one of all records that are quarantined now; None when
    there are none. Raises PlanError while the run itself has pending shards."""
    if run.pending():
        raise PlanError(f"{run.store.uri}: {len(run.pending())} shards are pending; finish diffva generate first")
    retries = overlays(run)
    if retries and retries[-1].pending():
        return retries[-1]
    records = committed(run, ["record_id", "status"])
    quarantined = records.filter(pc.field("status") != Status.OK.value)["record_id"]
    if not len(quarantined):
        return None
    # plan the quarantined records again
    plan = run.plan()
    table = cut_again(plan.filter(pc.is_in(plan["record_id"], quarantined)), run.recipe.generate.shard_size)
    # a repaired file has another size, so the planned size does not count
    unknown = pa.array(np.full(len(table), -1, np.int64))
    table = table.set_column(PLAN.get_field_index("image_size"), PLAN.field("image_size"), unknown)
    store = open_store(join(run.store.uri, OVERLAYS, f"r{len(retries) + 1}"))
    # stored keys, without the defaults of this version: a retry has the fingerprint of its run
    return start_run(store, table, run.about["keys"], run.about)
