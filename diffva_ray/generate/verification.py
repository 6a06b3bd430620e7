"""Every promise a finished run makes, checked against its files."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from diffva_ray.data.images import BadImage, decode_map, map_levels, pixel_digest
from diffva_ray.generate.plan import FOLDERS, Run, part
from diffva_ray.schema import RECORDS, Status


@dataclass(frozen=True)
class Problem:
    """One broken promise: the shard it belongs to and what is wrong, in one line."""

    shard: int
    what: str


def verify_shard(run: Run, shard: int, present: set[str] | None = None) -> list[Problem]:
    """What is wrong with one shard: its part, its ids, its fingerprint, its images' pixels (or, with the listing
    ``present``, only that they are there)."""
    name = f"records/{part(shard)}.parquet"
    try:
        table = pq.read_table(io.BytesIO(run.store.read(name)))
    except FileNotFoundError:
        return [Problem(shard, f"{name} is missing")]
    except (OSError, ValueError) as error:
        return [Problem(shard, f"{name} cannot be read ({' '.join(str(error).split())[:120]})")]
    problems = []
    metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    if metadata.get("fingerprint") != run.fingerprint:
        problems.append(Problem(shard, f"{name} carries fingerprint {metadata.get('fingerprint')}, not the run's"))
    if not table.schema.equals(RECORDS, check_metadata=False):
        return [*problems, Problem(shard, f"{name} has other columns than schema version 1")]
    planned = [row["record_id"] for row in run.shard_rows(shard)]
    if table["record_id"].to_pylist() != planned:
        problems.append(Problem(shard, f"{name} does not hold the planned records, each once and in order"))
    for row in table.to_pylist():
        if row["status"] != Status.OK.value:
            continue
        for path, digest, signed in (
            (row["counterfactual_path"], row["pixel_sha256"], False),
            (row["attribution_path"], row["map_sha256"], True),
            (row["reconstruction_path"], row["reconstruction_sha256"], False),
        ):
            if present is not None:
                wrong = None if path in present else "is missing"
            else:
                wrong = _image_problem(run, path, digest, signed)
            if wrong:
                problems.append(Problem(shard, f"{path} {wrong}"))
    return problems


def _image_problem(run: Run, path: str, expected: str, signed: bool) -> str | None:
    try:
        data = run.store.read(path)
        pixels = map_levels(decode_map(data)) if signed else np.asarray(Image.open(io.BytesIO(data)))
    except FileNotFoundError:
        return "is missing"
    except (BadImage, OSError, SyntaxError, ValueError) as error:
        return f"cannot be read ({error})"
    return None if pixel_digest(pixels) == expected else "has other pixels than its record says"


def verify(run: Run, pixels: bool = True) -> list[Problem]:
    """All problems of a run, by shard; an empty list is a complete and sound run. Without ``pixels`` images are looked
    up in one listing and not opened."""
    run.plan()
    present = None
    if not pixels:
        present = {path for folder in FOLDERS for path, size in run.store.list(folder) if size > 0}
    unplanned = [shard for shard in sorted(run.done()) if shard >= run.shards]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda shard: verify_shard(run, shard, present), range(run.shards)))
    strangers = [Problem(shard, f"records/{part(shard)}.parquet is not planned") for shard in unplanned]
    return [problem for problems in found for problem in problems] + strangers


def requeue(run: Run, problems: list[Problem]) -> list[int]:
    """Withdraw the commits of damaged shards, so that the next ``diffva generate`` makes them again."""
    damaged = sorted({problem.shard for problem in problems})
    for shard in damaged:
        run.store.delete(f"records/{part(shard)}.parquet")
    return damaged
