"""Checks the files of a run: parts, fingerprints, images, features, retries and the manifest."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, TypeAdapter

from diffva_ray.config.recipe import RecipeError
from diffva_ray.data.encoding import map_levels, pixel_digest
from diffva_ray.data.images import BadImage, decode_grey, decode_map
from diffva_ray.generate.committed import overlay_uri, sound_overlays
from diffva_ray.generate.run import DEVICE_FILE, DEVICE_NAME, FOLDERS, PART, PLAN_FILE, SUCCESS, PlanError, Run, part
from diffva_ray.generate.run_json import OVERLAYS, RUN, DamagedRun, check_layout
from diffva_ray.generate.shard_files import features_path
from diffva_ray.progress import one_line
from diffva_ray.schema import SCHEMA_VERSION, Status
from diffva_ray.storage.opening import open_store

MANIFEST = "manifest.json"
STATUSES = {status.value for status in Status}
IMAGES = (("counterfactual_path", "counterfactual_sha256"), ("attribution_path", "attribution_sha256"),
          ("reconstruction_path", "reconstruction_sha256"))  # columns of a record's images  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a run."""

    shard: int  # number of the shard; -1: no shard, but for instance a table, which reduce writes again
    what: str  # the problem, in one line
    overlay: int = 0  # number of the retry run, counted from 1; 0: the run itself
    pending: bool = False  # whether the shard is not committed, so that it is generated without a repair
    files: tuple[str, ...] = ()  # further files that ``requeue`` deletes, so that they are written again


def verify_shard(run: Run, shard: int, planned: Sequence[str], features: set[str] | None = None) -> list[Problem]:
    """Check one shard: its part, its record ids (``planned``), its fingerprint, its features and its images' pixels.

    ``features``: the listed feature files; if given, only the part is opened, and images and features must exist."""
    # the part and its schema
    name = f"records/{part(shard)}.parquet"
    try:
        table = pq.read_table(io.BytesIO(run.store.read(name)))
    except FileNotFoundError:
        return [Problem(shard, f"{name} is missing", pending=True)]
    except (OSError, ValueError) as error:
        return [Problem(shard, f"{name} cannot be read ({one_line(error, 120)})")]
    problems = []
    metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    if metadata.get("fingerprint") != run.fingerprint:
        problems.append(Problem(shard, f"{name} has fingerprint {metadata.get('fingerprint')}, not the run's"))
    if not table.schema.equals(run.records_schema, check_metadata=False):
        return [*problems, Problem(shard, f"{name} has other columns than schema version {SCHEMA_VERSION}")]
    # the records
    ids = table["record_id"].to_pylist()
    if ids != list(planned):
        problems.append(Problem(shard, f"{name} does not hold the planned records, each once and in order"))
    statuses, errors = table["status"].to_pylist(), table["error"].to_pylist()
    for record, status, reason in zip(ids, statuses, errors, strict=True):
        if status not in STATUSES or bool(reason) == (status == Status.OK.value):
            problems.append(Problem(shard, f"{name}: {record} has status {status}, {reason}"))
    # images and features
    ok = table.filter(pc.equal(table["status"], Status.OK.value))
    problems += _pixel_problems(run, shard, ok) if features is None else _missing_images(run, shard, ok)
    path = metadata.get("features", features_path(shard))
    what = _features_problem(run, path, ok["record_id"].to_pylist(), features)
    return [*problems, *([_file_problem(run, shard, path, what)] if what else [])]


def _pixel_problems(run: Run, shard: int, ok: pa.Table) -> list[Problem]:
    problems = []
    for row in ok.select([name for pair in IMAGES for name in pair]).to_pylist():
        for path, digest in IMAGES:
            what = _image_problem(run, row[path], row[digest], signed=path == "attribution_path")
            if what:
                problems.append(_file_problem(run, shard, row[path], what))
    return problems


def _file_problem(run: Run, shard: int, path: str, what: str) -> Problem:
    """A problem of a shard's image or features; a repair deletes the file, which no attempt replaces."""
    return Problem(shard, f"{path} {what}", files=(path,) if run.store.exists(path) else ())


def _missing_images(run: Run, shard: int, ok: pa.Table) -> list[Problem]:
    """Images that are missing or empty in a listing of the shard's folders."""
    listed = [run.store.list(f"{kind}/{part(shard)}") for kind in FOLDERS] if len(ok) else []
    present = {path for entries in listed for path, size in entries if size > 0}
    named = [path for row in zip(*(ok[column].to_pylist() for column, _ in IMAGES)) for path in row]
    return [Problem(shard, f"{path} is missing") for path in named if path not in present]


def _features_problem(run: Run, path: str, ids: list[str], listed: set[str] | None) -> str | None:
    if not ids:
        return None
    if listed is not None:
        return None if path in listed else "is missing"
    try:
        stored = np.load(io.BytesIO(run.store.read(path)))
        shapes = {stored[name].shape[0] for name in stored.files}
    except FileNotFoundError:
        return "is missing"
    except Exception as error:  # numpy raises many types: zip, npy header, refused pickle
        return f"cannot be read ({type(error).__name__})"
    return None if list(stored["ids"]) == ids and shapes == {len(ids)} else "does not hold the records that are ok"


def _image_problem(run: Run, path: str, expected: str, signed: bool) -> str | None:
    size = run.recipe.model.resolution
    try:
        data = run.store.read(path)
        pixels = map_levels(decode_map(data)) if signed else decode_grey(data)
    except FileNotFoundError:
        return "is missing"
    except (BadImage, OSError, SyntaxError, ValueError) as error:
        return f"cannot be read ({error})"
    if pixels.shape != (size, size):
        return f"is {' x '.join(map(str, pixels.shape))}, not {size} x {size}"
    return None if pixel_digest(pixels) == expected else "has other pixels than its record names"


def verify(run: Run, pixels: bool = True) -> list[Problem]:
    """Check all files of a run and of its retries.

    Args:
        run: The run, finished or not.
        pixels: Whether to open images and features and check the manifest; False: only check that they exist.

    Returns:
        The problems by shard; an empty list for a complete and intact run.

    Raises:
        DamagedRun: ``run.json`` has other numbers of records or shards than the plan that it names.
        RecipeError: The recipe in ``run.json`` cannot be read.
        StoreError: The store fails.
    """
    try:
        plan = _plan(run)
    except PlanError as error:
        return [Problem(-1, str(error), files=(PLAN_FILE,))]
    problems = _verify_parts(run, plan, pixels)
    ids = plan["record_id"]
    if pc.count_distinct(ids).as_py() < len(ids):
        twice = (row["values"] for row in pc.value_counts(ids).to_pylist() if row["counts"] > 1)
        problems += [Problem(-1, f"record {name} is planned twice") for name in twice]
    retries, damage = sound_overlays(run)
    for number, retry in enumerate(retries, start=1):
        problems += _verify_overlay(retry, number, ids, pixels)
    if damage is not None:
        number = len(retries) + 1
        problems.append(Problem(-1, str(damage), number, files=(f"{OVERLAYS}/r{number}/{RUN}",)))
    return problems + ([*_device_problem(run), *_manifest_problems(run)] if pixels else [])


def _plan(run: Run) -> pa.Table:
    """The record ids and shards of a plan with which ``run.json`` agrees."""
    plan = run.plan(["record_id", "shard"])
    check_layout(run.store, run.about, len(plan), plan["shard"][-1].as_py() + 1)
    return plan


def _verify_overlay(retry: Run, number: int, ids: pa.ChunkedArray, pixels: bool) -> list[Problem]:
    """Check a retry of a run with the record ids ``ids``."""
    folder = f"{OVERLAYS}/r{number}"
    try:
        plan = _plan(retry)
        _ = retry.recipe
    except (DamagedRun, RecipeError) as error:
        return [Problem(-1, str(error), number, files=(f"{folder}/{RUN}",))]
    except PlanError as error:  # diffva retry plans again only what has no run.json
        return [Problem(-1, str(error), number, files=(f"{folder}/{PLAN_FILE}", f"{folder}/{RUN}"))]
    problems = [
        replace(problem, what=f"{folder}: {problem.what}", overlay=number, files=_below(folder, problem.files))
        for problem in _verify_parts(retry, plan, pixels)
    ]
    if not pc.all(pc.is_in(plan["record_id"], value_set=ids)).as_py():
        problems.append(Problem(-1, f"{folder} holds records that the run has not planned", number))
    return problems


def _below(folder: str, paths: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{folder}/{path}" for path in paths)


def _verify_parts(run: Run, plan: pa.Table, pixels: bool) -> list[Problem]:
    listed = None if pixels else {path for path, size in run.store.list("features") if size > 0}
    starts = np.searchsorted(plan["shard"], np.arange(run.shards + 1))  # the plan is sorted by shard

    def verified(shard: int) -> list[Problem]:
        planned = plan["record_id"].slice(starts[shard], starts[shard + 1] - starts[shard]).to_pylist()
        return verify_shard(run, shard, planned, listed)

    problems = list[Problem]()
    with ThreadPoolExecutor(8) as pool:
        for of_shard in pool.map(verified, range(run.shards)):
            problems += of_shard
    unplanned = [shard for shard in sorted(run.done()) if shard >= run.shards]
    problems += [Problem(shard, f"records/{part(shard)}.parquet is not planned") for shard in unplanned]
    return problems + (_foreign_parts(run) if pixels else [])


def _foreign_parts(run: Run) -> list[Problem]:
    """Parquet files in ``records/`` that readers of the folder would take for records, such as a sync client's copy."""
    return [
        Problem(-1, f"{path} is no part of the run (a copy?); delete it")
        for path, _ in run.store.list("records")
        if path.endswith(".parquet") and not PART.fullmatch(path) and not path.rpartition("/")[2].startswith((".", "_"))
    ]


def _device_problem(run: Run) -> list[Problem]:
    """A missing or damaged DEVICE_FILE of a run with records, which a repair writes again."""
    if not run.done():
        return []
    try:
        TypeAdapter(dict[str, str]).validate_json(run.store.read(DEVICE_FILE), strict=True)[DEVICE_NAME]
    except FileNotFoundError:
        return [Problem(-1, f"{DEVICE_FILE} is missing")]
    except (OSError, ValueError, LookupError):
        return [Problem(-1, f"{DEVICE_FILE} is damaged", files=(DEVICE_FILE,))]
    return []


def _restore_device(run: Run) -> None:
    """Write a missing DEVICE_FILE again: the first part names the device. Without one, the next worker writes it."""
    for shard in sorted(run.done())[:1]:
        table = pq.read_table(io.BytesIO(run.store.read(f"records/{part(shard)}.parquet")), columns=["device"])
        run.store.put_if_absent(DEVICE_FILE, json.dumps({DEVICE_NAME: table["device"][0].as_py()}).encode())


class _Listed(BaseModel):
    """A file of the manifest."""

    bytes: int
    sha256: str = ""


class _Manifest(BaseModel):
    """The manifest."""

    fingerprint: str
    shards: int
    files: dict[str, _Listed]


def _manifest_problems(run: Run) -> list[Problem]:
    """Compare a finished run with its manifest: the size of every listed file, and its hash where one is listed."""
    if not run.store.exists(SUCCESS):
        return []
    try:
        TypeAdapter(dict[str, Any]).validate_json(run.store.read(SUCCESS))
    except (OSError, ValueError):
        return [Problem(-1, f"{SUCCESS} is damaged; diffva reduce writes it again")]
    again = "diffva verify --repair, then diffva reduce write it again"
    try:
        manifest = _Manifest.model_validate_json(run.store.read(MANIFEST))
    except FileNotFoundError:
        return [Problem(-1, f"{MANIFEST} is missing from a finished run; {again}")]
    except (OSError, ValueError) as error:
        what = f"{MANIFEST} cannot be read ({one_line(error, 120)}); {again}"
        return [Problem(-1, what)]
    if (manifest.fingerprint, manifest.shards) != (run.fingerprint, run.shards):
        return [Problem(-1, f"{MANIFEST} is of another run; {again}")]
    sizes, problems = dict(run.store.list()), []
    for path, entry in manifest.files.items():
        if path not in sizes:
            problems.append(Problem(-1, f"{path} is missing"))
        elif sizes[path] != entry.bytes:
            problems.append(Problem(-1, f"{path} has {sizes[path]} bytes, {entry.bytes} in {MANIFEST}"))
        elif entry.sha256 and hashlib.sha256(run.store.read(path)).hexdigest() != entry.sha256:
            problems.append(Problem(-1, f"{path} has other content than {MANIFEST} lists"))
    return problems


def requeue(run: Run, problems: list[Problem]) -> int:
    """Delete the commits of damaged shards and the other ``files`` of problems, and the run's ``_SUCCESS``; returns the
    number of these shards.

    The next ``diffva generate`` (or ``diffva retry``) writes them again, and ``diffva reduce`` writes new tables."""
    run.store.delete(SUCCESS)
    damaged = {(problem.overlay, problem.shard) for problem in problems if problem.shard >= 0}
    for overlay, shard in sorted(damaged):
        (open_store(overlay_uri(run, overlay)) if overlay else run.store).delete(f"records/{part(shard)}.parquet")
    for path in {path for problem in problems for path in problem.files}:
        run.store.delete(path)
    _restore_device(run)
    return len(damaged)
