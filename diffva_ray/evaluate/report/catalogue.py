"""The records of the viewer as files that a page from disk can load.

A browser lets such a page neither fetch JSON nor import modules, but it does run a script beside it; so every file here
is one statement that hands its records to the script element that asked for it. The index (what is filtered, sorted and
listed) is read at once; details (all columns of a record) are read when a record is looked at.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from diffva_ray.evaluate.records import finished, read_records
from diffva_ray.evaluate.report.images import Pictured
from diffva_ray.evaluate.tables import clean, known
from diffva_ray.generate.committed import overlays
from diffva_ray.generate.run import Run, part
from diffva_ray.schema import Row, Status

FOLDER = "report/data"
INDEX, DETAILS = 4000, 200  # records of one file
BEFORE, AFTER = 'document.currentScript.dispatchEvent(new CustomEvent("records",{detail:', "}));\n"


@dataclass(frozen=True)
class Measure:
    """A score to filter and sort by. ``better``: "high", "low" or nothing."""

    key: str
    title: str
    digits: int = 3
    better: str = ""


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
INTEGERS = {"ms_ssim_scales", "width", "height", "num_inference_steps", "sample"}


def scripted(value: Any) -> bytes:
    """``value`` as a script of pure ASCII; nothing in a JSON literal can end it."""
    return f"{BEFORE}{json.dumps(clean(value), separators=(',', ':'))}{AFTER}".encode()


def unscripted(data: bytes) -> Any:
    """What ``scripted`` was given. Raises ValueError for anything else."""
    text = data.decode()
    if not (text.startswith(BEFORE) and text.endswith(AFTER)):
        raise ValueError("not a file of records")
    return json.loads(text[len(BEFORE) : -len(AFTER)])


@dataclass(frozen=True)
class Earlier:
    """What an earlier report has left: its pictures by record, and the limit of its colours."""

    pictures: dict[str, Pictured]
    limit: float | None


def read_earlier(run: Run) -> Earlier:
    """The state of an earlier report; empty when there is none, or one of another version."""
    paths = [entry.path for entry in run.store.list(FOLDER)]
    names = {field.name for field in fields(Pictured)}
    pictures: dict[str, Pictured] = {}
    limit = None
    try:
        if f"{FOLDER}/index-000.js" in paths:
            limit = float(unscripted(run.store.read(f"{FOLDER}/index-000.js"))["about"]["limit"])
        with ThreadPoolExecutor(8) as pool:
            for data in pool.map(run.store.read, [path for path in paths if path.startswith(f"{FOLDER}/details-")]):
                for row in unscripted(data):
                    if row.get("key"):
                        pictures[row["record_id"]] = Pictured(**{name: row[name] for name in names})
    except (ValueError, KeyError, TypeError, OSError):
        return Earlier({}, None)
    return Earlier(pictures, limit)


def write_catalogue(
    run: Run, rows: list[Row], pictures: dict[str, Pictured], about: Row, varied: dict[str, str]
) -> int:
    """Write index and details of ``rows``, and delete what an earlier report had beyond them; returns how many files
    the index has. ``about`` goes to the page as it is; ``varied``: what a sweep changed, by record id."""
    history = attempts(run)
    missing = {field.name: None for field in fields(Pictured)} | {"key": "", "truth": False, "lesion": "", "lungs": ""}
    full = []
    for row in rows:
        found = pictures.get(row["record_id"])
        extra = {"attempts": history.get(row["record_id"], [])}
        full.append({**_columns(row), **(asdict(found) if found else missing), **extra})
    measures = [m for m in MEASURES if any(known(row.get(m.key)) for row in full)]
    labels, statuses = (list(dict.fromkeys(row[key] for row in rows)) for key in ("label", "status"))
    labels.sort()
    statuses.sort(key=lambda status: (status != Status.OK.value, status))
    about = {
        **about, "labels": labels, "statuses": statuses, "measures": [asdict(m) for m in measures],
        "total": len(rows), "perDetail": DETAILS,
    }  # fmt: skip
    files: dict[str, bytes] = {}
    chunks = list(_chunks(full, INDEX)) or [[]]
    for n, chunk in enumerate(chunks):
        index = _index(chunk, labels, statuses, measures, varied)
        files[f"index-{n:03d}.js"] = scripted({"about": about, **index} if n == 0 else index)
    for n, chunk in enumerate(_chunks(full, DETAILS)):
        files[f"details-{n:04d}.js"] = scripted(chunk)
    for name, data in files.items():
        run.store.put(f"{FOLDER}/{name}", data)
    for entry in run.store.list(FOLDER):
        if entry.path.removeprefix(f"{FOLDER}/") not in files:
            run.store.delete(entry.path)
    return len(chunks)


def _index(
    rows: list[Row], labels: list[str], statuses: list[str], measures: list[Measure], varied: dict[str, str]
) -> Row:
    """Columns, as short as they can be: this is what has to be there before anything is seen."""
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


def _columns(row: Row) -> Row:
    """A record's columns for JSON. Seeds are 64 bits, which a number of JavaScript does not hold."""
    made: Row = {}
    for key, value in row.items():
        if not known(value):
            made[key] = None
        elif key in INTEGERS:
            made[key] = int(value)
        elif key == "seed":
            made[key] = str(int(value))
        else:
            made[key] = value
    return made


def _chunks(rows: list[Row], size: int) -> Iterable[list[Row]]:
    return (rows[at : at + size] for at in range(0, len(rows), size))


def attempts(run: Run) -> dict[str, list[Row]]:
    """How every retried record ended, the first time and at each retry: (try, status, error), oldest first."""
    found: dict[str, list[Row]] = {}
    for number, overlay in enumerate(overlays(run), start=1):
        tried = read_records(overlay)[["record_id", "status", "error"]].to_dict("records")
        fresh = {row["record_id"] for row in tried} - set(found)
        for row in _first(run, fresh) if fresh else []:
            found[row["record_id"]] = [{"try": "first", "status": row["status"], "error": row["error"]}]
        for row in tried:
            last = {"try": f"retry {number}", "status": row["status"], "error": row["error"]}
            found.setdefault(row["record_id"], []).append(last)
    return found


def _first(run: Run, records: set[str]) -> Iterable[Row]:
    """Rows of the run's own parts, before any retry was laid over them."""
    plan = run.plan()
    shards = {row["shard"] for row in plan.select(["record_id", "shard"]).to_pylist() if row["record_id"] in records}
    for shard in sorted(shards):
        data = io.BytesIO(run.store.read(f"records/{part(shard)}.parquet"))
        for row in pq.read_table(data, columns=["record_id", "status", "error"]).to_pylist():
            if row["record_id"] in records:
                yield row


def counts(records: pd.DataFrame, history: dict[str, list[Row]]) -> Row:
    """Retried records: how many, and how many of them are ok now."""
    ok = set(finished(records)["record_id"])
    return {"retried": len(history), "mended": sum(record in ok for record in history)}
