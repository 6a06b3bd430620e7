"""Every promise a finished run makes, checked against its files."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from diffva_ray.data.encoding import map_levels, pixel_digest
from diffva_ray.data.images import BadImage, decode_map
from diffva_ray.generate.committed import overlays
from diffva_ray.generate.run import FOLDERS, SUCCESS, Run, part
from diffva_ray.progress import one_line
from diffva_ray.schema import RECORDS, SCHEMA_VERSION, Status

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Problem:
    """One broken promise: the shard it belongs to and what is wrong, in one line. ``overlay`` counts retries from 1; 0
    is the run itself. A ``shard`` of -1 is none: a table, say, which reduce writes again."""

    shard: int
    what: str
    overlay: int = 0


STATUSES = {status.value for status in Status}


def verify_shard(run: Run, shard: int, planned: Sequence[str], features: set[str] | None = None) -> list[Problem]:
    """What is wrong with one shard: its part, its ids (``planned``), its fingerprint, its images' pixels. With a
    listing of ``features`` nothing but the part is opened: features and images have to be there."""
    name = f"records/{part(shard)}.parquet"
    try:
        table = pq.read_table(io.BytesIO(run.store.read(name)))
    except FileNotFoundError:
        return [Problem(shard, f"{name} is missing")]
    except (OSError, ValueError) as error:
        return [Problem(shard, f"{name} cannot be read ({one_line(error, 120)})")]
    problems = []
    metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    if metadata.get("fingerprint") != run.fingerprint:
        problems.append(Problem(shard, f"{name} carries fingerprint {metadata.get('fingerprint')}, not the run's"))
    if not table.schema.equals(RECORDS, check_metadata=False):
        return [*problems, Problem(shard, f"{name} has other columns than schema version {SCHEMA_VERSION}")]
    ids = table["record_id"].to_pylist()
    if ids != list(planned):
        problems.append(Problem(shard, f"{name} does not hold the planned records, each once and in order"))
    statuses, errors = table["status"].to_pylist(), table["error"].to_pylist()
    for record, status, reason in zip(ids, statuses, errors, strict=True):
        if status not in STATUSES or bool(reason) == (status == Status.OK.value):
            problems.append(Problem(shard, f"{name}: {record} has status {status}, {reason}"))
    ok = table.filter(pc.equal(table["status"], Status.OK.value))
    problems += _pixel_problems(run, shard, ok) if features is None else _absent(run, shard, ok)
    wrong = _features_problem(run, shard, ok["record_id"].to_pylist(), features)
    return [*problems, *([Problem(shard, wrong)] if wrong else [])]


IMAGES = (("counterfactual_path", "counterfactual_sha256"), ("attribution_path", "attribution_sha256"),
          ("reconstruction_path", "reconstruction_sha256"))  # fmt: skip


def _pixel_problems(run: Run, shard: int, ok: pa.Table) -> list[Problem]:
    problems = []
    for row in ok.select([name for pair in IMAGES for name in pair]).to_pylist():
        for path, digest in IMAGES:
            wrong = _image_problem(run, row[path], row[digest], signed=path == "attribution_path")
            if wrong:
                problems.append(Problem(shard, f"{row[path]} {wrong}"))
    return problems


def _absent(run: Run, shard: int, ok: pa.Table) -> list[Problem]:
    """Images that are not there, or empty, by a listing of the shard's folders."""
    listed = [run.store.list(f"{kind}/{part(shard)}") for kind in FOLDERS] if len(ok) else []
    present = {path for entries in listed for path, size in entries if size > 0}
    named = [path for row in zip(*(ok[column].to_pylist() for column, _ in IMAGES)) for path in row]
    return [Problem(shard, f"{path} is missing") for path in named if path not in present]


def _features_problem(run: Run, shard: int, ids: list[str], listed: set[str] | None) -> str | None:
    path = f"features/{part(shard)}.npz"
    if not ids:
        return None
    if listed is not None:
        return None if path in listed else f"{path} is missing"
    try:
        stored = np.load(io.BytesIO(run.store.read(path)))
        shapes = {stored[name].shape[0] for name in stored.files}
    except FileNotFoundError:
        return f"{path} is missing"
    except Exception as error:  # zip, npy header, pickle refused: numpy raises what it meets
        return f"{path} cannot be read ({type(error).__name__})"
    return None if list(stored["ids"]) == ids and shapes == {len(ids)} else f"{path} is not of the records that are ok"


def _image_problem(run: Run, path: str, expected: str, signed: bool) -> str | None:
    size = run.recipe.model.resolution
    try:
        data = run.store.read(path)
        pixels = map_levels(decode_map(data)) if signed else np.asarray(Image.open(io.BytesIO(data)))
    except FileNotFoundError:
        return "is missing"
    except (BadImage, OSError, SyntaxError, ValueError) as error:
        return f"cannot be read ({error})"
    if pixels.shape != (size, size):
        return f"is {' x '.join(map(str, pixels.shape))}, not {size} x {size}"
    return None if pixel_digest(pixels) == expected else "has other pixels than its record says"


def verify(run: Run, pixels: bool = True) -> list[Problem]:
    """All problems of a run and of its retries, by shard; an empty list is a complete and sound run. Without ``pixels``
    images are looked up by name and not opened."""
    known = run.plan(["record_id", "shard"])
    problems = _verify_parts(run, known, pixels)
    ids = known["record_id"]
    if pc.count_distinct(ids).as_py() < len(ids):
        twice = (row["values"] for row in pc.value_counts(ids).to_pylist() if row["counts"] > 1)
        problems += [Problem(-1, f"record {name} is planned twice") for name in twice]
    for number, overlay in enumerate(overlays(run), start=1):
        retried = overlay.plan(["record_id", "shard"])
        found = _verify_parts(overlay, retried, pixels)
        problems += [replace(one, what=f"overlays/r{number}: {one.what}", overlay=number) for one in found]
        if not pc.all(pc.is_in(retried["record_id"], value_set=ids)).as_py():
            problems.append(Problem(-1, f"overlays/r{number} holds records that the run has not planned", number))
    return problems + (_manifest_problems(run) if pixels else [])


def _verify_parts(run: Run, plan: pa.Table, pixels: bool) -> list[Problem]:
    listed = None if pixels else {path for path, size in run.store.list("features") if size > 0}
    starts = np.searchsorted(plan["shard"], np.arange(run.shards + 1))  # a plan is in the order of its shards

    def verified(shard: int) -> list[Problem]:
        planned = plan["record_id"].slice(starts[shard], starts[shard + 1] - starts[shard]).to_pylist()
        return verify_shard(run, shard, planned, listed)

    problems = list[Problem]()
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(verified, range(run.shards)):
            problems += found
    unplanned = [shard for shard in sorted(run.done()) if shard >= run.shards]
    return problems + [Problem(shard, f"records/{part(shard)}.parquet is not planned") for shard in unplanned]


def _manifest_problems(run: Run) -> list[Problem]:
    """A finished run against its manifest: every file with its size, and its hash where no record vouches for it."""
    if not run.store.exists(SUCCESS):
        return []
    try:
        files = json.loads(run.store.read(MANIFEST))["files"]
    except FileNotFoundError:
        return [Problem(-1, f"{MANIFEST} is missing from a finished run")]
    except (ValueError, KeyError) as error:
        return [Problem(-1, f"{MANIFEST} cannot be read ({error})")]
    sizes, problems = dict(run.store.list()), []
    for path, about in files.items():
        if path not in sizes:
            problems.append(Problem(-1, f"{path} is missing"))
        elif sizes[path] != about["bytes"]:
            problems.append(Problem(-1, f"{path} has {sizes[path]} bytes, {about['bytes']} in {MANIFEST}"))
        elif "sha256" in about and hashlib.sha256(run.store.read(path)).hexdigest() != about["sha256"]:
            problems.append(Problem(-1, f"{path} has another content than {MANIFEST} says"))
    return problems


def requeue(run: Run, problems: list[Problem]) -> int:
    """Withdraw the commits of damaged shards, so that the next ``diffva generate`` (or ``diffva retry``) makes them
    again, and the run's ``_SUCCESS``, so that ``diffva reduce`` writes its tables again. Number of shards."""
    run.store.delete(SUCCESS)
    retries = overlays(run)
    damaged = sorted({(problem.overlay, problem.shard) for problem in problems if problem.shard >= 0})
    for overlay, shard in damaged:
        (retries[overlay - 1] if overlay else run).store.delete(f"records/{part(shard)}.parquet")
    return len(damaged)
