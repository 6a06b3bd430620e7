"""What a run has committed: the records of its parts, with those of later retries laid over them.

A retry is a run of its own below ``overlays/``: same settings, and the records that were quarantined. Its rows stand in
for the first ones wherever a run is read; committed parts are never edited.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diffva_ray.generate.plan import PlanError, Run, cut, open_run, part, start_run
from diffva_ray.schema import PLAN, RECORDS, Status
from diffva_ray.storage import join, open_store

OVERLAYS = "overlays"
PATHS = ("counterfactual_path", "attribution_path", "reconstruction_path")


def overlays(run: Run) -> list[Run]:
    """The retries of a run, oldest first."""
    found: list[Run] = []
    while (overlay := open_run(open_store(join(run.store.uri, OVERLAYS, f"r{len(found) + 1}")))) is not None:
        found.append(overlay)
    return found


def committed(run: Run, columns: Sequence[str] | None = None) -> pa.Table:
    """All records that are committed, in plan order, each once: a retried one as its last retry left it.

    Paths are relative to ``run``. Without ``columns`` all of RECORDS.
    """
    names = list(columns) if columns is not None else RECORDS.names
    wanted = [*names, *(["record_id"] if "record_id" not in names else [])]
    table = _parts(run, wanted)
    for number, overlay in enumerate(overlays(run), start=1):
        later = _parts(overlay, wanted)
        for name in set(PATHS) & set(wanted):
            column = pc.binary_join_element_wise(f"{OVERLAYS}/r{number}", later[name], "/")
            later = later.set_column(later.column_names.index(name), name, column)
        table = _lay_over(table, later)
    return table.select(names)


def _parts(run: Run, columns: list[str]) -> pa.Table:
    def read(shard: int) -> pa.Table:
        data = io.BytesIO(run.store.read(f"records/{part(shard)}.parquet"))
        return pq.read_table(data, columns=columns).replace_schema_metadata(None)

    with ThreadPoolExecutor(8) as pool:
        tables = list(pool.map(read, [shard for shard in sorted(run.done()) if shard < run.shards]))
    empty = pa.schema([RECORDS.field(name) for name in columns]).empty_table()
    return pa.concat_tables(tables) if tables else empty


def _lay_over(table: pa.Table, later: pa.Table) -> pa.Table:
    """``table`` with the rows of ``later`` in the place of those with the same record_id."""
    place = {record: n for n, record in enumerate(table["record_id"].to_pylist())}
    rows = list(range(len(table)))
    for n, record in enumerate(later["record_id"].to_pylist(), start=len(table)):
        if record in place:
            rows[place[record]] = n
    return pa.concat_tables([table, later]).take(rows)


def start_retry(run: Run) -> Run | None:
    """The retry to work on: one that was interrupted, else a new one of all records that are quarantined now; None
    when there are none. Raises PlanError while the run itself is not finished."""
    if run.pending():
        raise PlanError(f"{run.store.uri}: {len(run.pending())} shards are pending; finish diffva generate first")
    before = overlays(run)
    if before and before[-1].pending():
        return before[-1]
    records = committed(run, ["record_id", "status"])
    quarantined = set(records.filter(pc.field("status") != Status.OK.value)["record_id"].to_pylist())
    if not quarantined:
        return None
    rows = [row for row in run.plan().to_pylist() if row["record_id"] in quarantined]
    # a file that was mended has another size: what is read now is what counts
    table = pa.Table.from_pylist(cut([{**row, "source_size": -1} for row in rows], run.recipe), schema=PLAN)
    about = {key: value for key, value in run.about.items() if key not in ("records", "shards", "plan_sha256")}
    store = open_store(join(run.store.uri, OVERLAYS, f"r{len(before) + 1}"))
    return start_run(store, table, run.about["keys"], about)
