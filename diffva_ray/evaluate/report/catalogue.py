"""Records of the viewer as JavaScript files that a page opened from disk can load.

A browser does not let such a page fetch JSON, but it runs a script beside the page. So each file is one statement that
passes its records to the script element that loaded it. The index (columns to filter, sort and list) is loaded at
once; details (all columns of a record) are loaded when the record is viewed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from diffva_ray.evaluate.marks import marks
from diffva_ray.evaluate.records import as_records, finished, read_records
from diffva_ray.evaluate.report.images import PanelFiles
from diffva_ray.evaluate.tables import clean, known
from diffva_ray.generate.committed import overlays
from diffva_ray.generate.run import Run, part
from diffva_ray.schema import Record, Status, TableRow

FOLDER = "report/data"
INDEX_RECORDS, DETAIL_RECORDS = 4000, 200  # records in one file
BEFORE, AFTER = 'document.currentScript.dispatchEvent(new CustomEvent("records",{detail:', "}));\n"


@dataclass(frozen=True)
class Measure:
    """A score to filter and sort by."""

    key: str  # column of the record
    title: str
    digits: int = 3  # after the decimal point
    better: str = ""  # "high", "low" or empty


MEASURES = (
    Measure("ssim", "SSIM"),
    Measure("ms_ssim", "MS-SSIM"),
    Measure("psnr", "PSNR, dB", 1),
    Measure("attribution_energy", "map energy", 4),
    Measure("attribution_energy_lung_fraction", "map energy in lungs"),
    Measure("judge_image", "judge: image healthy"),
    Measure("judge_counterfactual", "judge: counterfactual healthy", better="high"),
    Measure("auroc", "AUROC of the map", better="high"),
    Measure("dice_best", "Dice of the map, best τ", better="high"),
)
NAMES = "report/files.csv"  # files of every record by the name of its image
NAMED = ("image_path", "label", "prompt", "sample", "status", "counterfactual_path", "attribution_path",
         "reconstruction_path", "record_id")  # its columns; paths of the run are relative to it  # fmt: skip
INTEGERS = {"ms_ssim_scales", "width", "height", "num_inference_steps", "sample"}


def scripted(value: Any) -> bytes:
    """``value`` as an ASCII script; no JSON string can end the script."""
    return f"{BEFORE}{json.dumps(clean(value), separators=(',', ':'))}{AFTER}".encode()


def unscripted(data: bytes) -> Any:
    """The value of a file made by ``scripted``. Raises ValueError for other files."""
    text = data.decode()
    if not (text.startswith(BEFORE) and text.endswith(AFTER)):
        raise ValueError("not a file of records")
    return json.loads(text[len(BEFORE) : -len(AFTER)])


@dataclass(frozen=True)
class EarlierReport:
    """What a new report reuses of an earlier one."""

    panels: dict[str, PanelFiles]  # by record id
    limit: float | None  # of the map colours


def read_earlier(run: Run) -> EarlierReport:
    """The state of an earlier report; empty without one, or for one of another version."""
    paths = [entry.path for entry in run.store.list(FOLDER)]
    names = {field.name for field in fields(PanelFiles)}
    panels: dict[str, PanelFiles] = {}
    limit = None
    try:
        if f"{FOLDER}/index-000.js" in paths:
            limit = float(unscripted(run.store.read(f"{FOLDER}/index-000.js"))["about"]["limit"])
        with ThreadPoolExecutor(8) as pool:
            for data in pool.map(run.store.read, [path for path in paths if path.startswith(f"{FOLDER}/details-")]):
                for row in unscripted(data):
                    if row.get("key"):
                        panels[row["record_id"]] = PanelFiles(**{name: row[name] for name in names})
    except (ValueError, KeyError, TypeError, OSError):
        return EarlierReport({}, None)
    return EarlierReport(panels, limit)


def write_catalogue(
    run: Run, rows: Sequence[Record], panels: dict[str, PanelFiles], about: dict[str, Any], varied: dict[str, str]
) -> int:
    """Write index and details of ``rows``, delete other files of an earlier report, return the number of index files.

    ``about`` is passed to the page unchanged; ``varied`` maps record ids to the swept settings of the record.
    """
    # all columns of each record
    history = attempts(run)
    no_panels = PanelFiles("", False, "", "", None, None)
    full = []
    for row in rows:
        files_of_record = asdict(panels.get(row["record_id"], no_panels))
        mark = marks(row.get("view"), row.get("spacing"), row.get("width"))
        about_image = {"sides": mark.sides, "bar": mark.bar, "attempts": history.get(row["record_id"], [])}
        full.append({**_columns(row), **files_of_record, **about_image})
    # the values that the index numbers
    measures = [m for m in MEASURES if any(known(row.get(m.key)) for row in full)]
    labels = sorted({row["label"] for row in rows})
    statuses = sorted({row["status"] for row in rows}, key=lambda status: (status != Status.OK.value, status))
    about = {
        **about, "labels": labels, "statuses": statuses, "measures": [asdict(m) for m in measures],
        "total": len(rows), "perDetail": DETAIL_RECORDS,
    }  # fmt: skip
    # files
    files: dict[str, bytes] = {}
    chunks = list(_chunks(full, INDEX_RECORDS)) or [[]]
    for n, chunk in enumerate(chunks):
        index = _index(chunk, labels, statuses, measures, varied)
        files[f"index-{n:03d}.js"] = scripted({"about": about, **index} if n == 0 else index)
    for n, chunk in enumerate(_chunks(full, DETAIL_RECORDS)):
        files[f"details-{n:04d}.js"] = scripted(chunk)
    for name, data in files.items():
        run.store.put(f"{FOLDER}/{name}", data)
    for entry in run.store.list(FOLDER):
        if entry.path.removeprefix(f"{FOLDER}/") not in files:
            run.store.delete(entry.path)
    return len(chunks)


def write_names(run: Run, records: pd.DataFrame) -> None:
    """Write the table in which the files of a record are found by the name of its image."""
    table = records[[*NAMED]].sort_values(["image_path", "label", "record_id"])
    run.store.put(NAMES, table.to_csv(index=False).encode())


def _index(
    rows: list[TableRow], labels: list[str], statuses: list[str], measures: list[Measure], varied: dict[str, str]
) -> dict[str, Any]:
    """The index as short columns, because it must be loaded before anything is displayed."""
    return {
        "id": [row["record_id"] for row in rows],
        "label": [labels.index(row["label"]) for row in rows],
        "status": [statuses.index(row["status"]) for row in rows],
        "path": [row["image_path"] for row in rows],
        "key": [row["key"] for row in rows],
        "truth": [int(row["truth"]) for row in rows],
        "retried": [int(len(row["attempts"]) > 1) for row in rows],
        "note": [row["error"] or varied.get(row["record_id"], "") for row in rows],
        "scores": {m.key: [_rounded(row.get(m.key)) for row in rows] for m in measures},
    }


def _rounded(value: Any) -> float | None:
    return float(f"{value:.5g}") if known(value) else None


def _columns(row: Mapping[str, Any]) -> TableRow:
    """A record's columns for JSON; the 64-bit seed becomes text because a JavaScript number cannot hold it."""
    result: TableRow = {}
    for key, value in row.items():
        if not known(value):
            result[key] = None
        elif key in INTEGERS:
            result[key] = int(value)
        else:
            result[key] = str(int(value)) if key == "seed" else value
    return result


def _chunks(rows: list[TableRow], size: int) -> Iterable[list[TableRow]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def attempts(run: Run) -> dict[str, list[TableRow]]:
    """The outcomes of every retried record, oldest first: (try, status, error) of the first attempt and each retry."""
    history: dict[str, list[TableRow]] = {}
    for number, overlay in enumerate(overlays(run), start=1):
        retried = as_records(read_records(overlay)[["record_id", "status", "error"]])
        new = {row["record_id"] for row in retried} - set(history)
        for row in _first_attempts(run, new) if new else []:
            history[row["record_id"]] = [{"try": "first", "status": row["status"], "error": row["error"]}]
        for row in retried:
            outcome = {"try": f"retry {number}", "status": row["status"], "error": row["error"]}
            history.setdefault(row["record_id"], []).append(outcome)
    return history


def _first_attempts(run: Run, records: set[str]) -> Iterable[Record]:
    """Rows of the run's own parts, without its retries."""
    plan = run.plan()
    shards = {row["shard"] for row in plan.select(["record_id", "shard"]).to_pylist() if row["record_id"] in records}
    for shard in sorted(shards):
        data = io.BytesIO(run.store.read(f"records/{part(shard)}.parquet"))
        for row in pq.read_table(data, columns=["record_id", "status", "error"]).to_pylist():
            if row["record_id"] in records:
                yield row


def counts(records: pd.DataFrame, history: dict[str, list[TableRow]]) -> dict[str, int]:
    """Numbers of retried records, and of those that are ok now."""
    ok = set(finished(records)["record_id"])
    return {"retried": len(history), "fixed": sum(record in ok for record in history)}
