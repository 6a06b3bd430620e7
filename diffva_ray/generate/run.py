"""A run on disk: ``run.json``, the plan beside it, what is done and what is pending.

``run.json`` guards it: going on with anything that would change a pixel is refused, by name.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diffva_ray.config.recipe import (
    GenerateConfig,
    Recipe,
    fingerprint,
    fingerprint_difference,
    make_recipe,
)
from diffva_ray.data.dataset import UnusableData
from diffva_ray.schema import PLAN, SCHEMA_VERSION
from diffva_ray.storage.store import Ranges, Store, open_store, opened

RUN, PLAN_FILE, SUCCESS = "run.json", "plan.parquet", "_SUCCESS"
FOLDERS = ("counterfactuals", "attributions", "reconstructions")  # the images of a record, one file each
ENVIRONMENT = ("torch", "device", "engine")  # may be changed on request; everything else may not
ROW_GROUPS = 4096  # at most, or the footer, which every worker reads, would grow with the run


class FingerprintDiffers(Exception):
    """The run was planned with another configuration; ``keys`` names what differs."""

    def __init__(self, uri: str, keys: Sequence[str], old: dict[str, Any], new: dict[str, Any]) -> None:
        self.keys = list(keys)
        changes = "; ".join(f"{key}: {old.get(key)!r} there, {new.get(key)!r} now" for key in keys)
        only_environment = set(keys) <= set(ENVIRONMENT)
        hint = "--allow-environment-change goes on all the same" if only_environment else "choose another --out"
        super().__init__(f"{uri} was made with another configuration ({changes}); {hint}")


class PlanError(ValueError):
    """A plan that cannot be made; the message is one line that names the option at fault."""


class DamagedRun(ValueError):
    """``run.json`` cannot be read; the message is one line."""


class Unfinished(Exception):
    """A run that cannot be worked on; the message is one line."""


def part(shard: int) -> str:
    """``part-00012``: the name that everything of one shard carries."""
    return f"part-{shard:05d}"


@dataclass(frozen=True)
class Run:
    """A planned run: where it is, and ``run.json`` (``about``). ``open_run("runs/first")`` opens one.

    Reading the plan raises PlanError where it is not the one that ``run.json`` was written for.
    """

    store: Store
    about: dict[str, Any]

    @cached_property
    def data(self) -> Store:
        """Where its images are. Raises UnknownScheme."""
        return opened(self.about["data_root"])

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe it was planned with. Raises RecipeError for one that this version cannot read."""
        return make_recipe(self.about["recipe"])

    @property
    def fingerprint(self) -> str:
        """Digest of the keys as they were when the run was planned: 16 hex digits."""
        return str(self.about["fingerprint"])

    @cached_property
    def keys(self) -> dict[str, Any]:
        """What the fingerprint was taken of. A setting that came after the run was planned has its default, and
        timesteps that were spaced before there was a choice are "leading"."""
        stored = self.about["keys"]
        known = {key: value for key, value in stored.items() if key in GenerateConfig.model_fields}
        settings = GenerateConfig.model_validate(known).model_dump(mode="json")
        return {"timestep_spacing": "leading", "bits": 16, **stored, **settings}

    @property
    def shards(self) -> int:
        """Number of planned shards."""
        return int(self.about["shards"])

    def plan(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The whole plan (columns of ``schema.PLAN``), or some of its columns."""
        data = self._whole
        if hashlib.sha256(data).hexdigest() != self.about["plan_sha256"]:
            raise self._another_plan()
        return pq.read_table(io.BytesIO(data), columns=columns)

    @cached_property
    def _footer(self) -> pq.FileMetaData:
        """The plan's footer, which holds the digest of all ids, and is checked."""
        place = self.about["plan_footer"]
        with self._planned():
            tail = self.store.read_range(PLAN_FILE, place["start"], place["stop"])
        if hashlib.sha256(tail).hexdigest() != place["sha256"]:
            raise self._another_plan()
        return pq.read_metadata(io.BytesIO(tail))

    @property
    def _whole(self) -> bytes:
        with self._planned():
            return self.store.read(PLAN_FILE)

    @contextmanager
    def _planned(self) -> Iterator[None]:
        """Raises PlanError in the place of FileNotFoundError: the run was claimed, and its plan is not there (yet)."""
        try:
            yield
        except FileNotFoundError:
            raise PlanError(
                f"{self.store.uri}/{PLAN_FILE} is missing; give the run's own diffva generate command again, which "
                "writes it"
            ) from None

    def _opened(self) -> pq.ParquetFile:
        """The plan as a file of which only what is asked for is read; the pages carry checksums. Opened anew for every
        reader: threads that share a ParquetFile crash."""
        if "plan_footer" not in self.about:  # planned by an earlier version
            return pq.ParquetFile(io.BytesIO(self._whole))
        ranges = Ranges(self.store, PLAN_FILE, self.about["plan_footer"]["stop"])
        return pq.ParquetFile(ranges, metadata=self._footer, pre_buffer=True, page_checksum_verification=True)

    def _another_plan(self) -> PlanError:
        return PlanError(f"{self.store.uri}/{PLAN_FILE} is not the plan that {RUN} was written for")

    def shard_rows(self, shard: int) -> list[dict[str, Any]]:
        """The planned records of one shard, as rows of ``schema.PLAN``; only the row group that holds it is read."""
        group = self._opened().read_row_group(shard // self.about.get("shards_per_row_group", 1))
        return group.filter(pc.equal(group["shard"], shard)).to_pylist()

    def shard_sizes(self) -> list[int]:
        """Number of records of each shard."""
        return np.bincount(self._opened().read(["shard"])["shard"], minlength=self.shards).tolist()

    def done(self) -> set[int]:
        """Numbers of the committed shards, from one listing."""
        return {
            int(name[len("records/part-") : -len(".parquet")])
            for name, _ in self.store.list("records")
            if name.startswith("records/part-") and name.endswith(".parquet")
        }

    def pending(self) -> list[int]:
        """Numbers of the shards that are not committed, rising."""
        done = self.done()
        return [shard for shard in range(self.shards) if shard not in done]


def open_run(uri: str) -> Run:
    """The run at ``uri``, a folder or an address such as ``s3://bucket/runs/first``; it is read, never written to.

    Raises UnusableData when nothing was planned there or ``run.json`` is damaged, StoreError when the store fails.
    """
    try:
        run = find_run(open_store(uri))
    except ValueError as error:
        raise UnusableData(str(error)) from None
    if run is None:
        raise UnusableData(f"{uri}: no run there (no run.json); make one with diffva generate")
    return run


def find_run(store: Store) -> Run | None:
    """The run at ``store``, or None when nothing has been planned there."""
    try:
        about = json.loads(store.read(RUN))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except json.JSONDecodeError as error:
        raise DamagedRun(f"{store.uri}/{RUN} is damaged ({error})") from None
    if (
        isinstance(about, dict)
        and (version := about.get("keys", {}).get("schema_version", SCHEMA_VERSION)) < SCHEMA_VERSION
    ):
        raise DamagedRun(
            f"{store.uri}: a run of an earlier version (schema {version}), whose files and columns have other names; "
            "choose another folder and make it again"
        )
    return Run(store, about)


def continue_run(run: Run, keys: dict[str, Any], allow_environment_change: bool = False) -> Run:
    """The same run, if ``keys`` are the ones it was planned with. Raises FingerprintDiffers; a permitted change of
    environment is recorded in ``run.json``."""
    old = run.keys
    different = fingerprint_difference(old, keys)
    if not different:
        return run
    if not allow_environment_change or not set(different) <= set(ENVIRONMENT):
        raise FingerprintDiffers(run.store.uri, different, old, keys)
    change = {key: keys[key] for key in ENVIRONMENT}
    changes = run.about.get("environment_changes", [])
    if change in changes:
        return run
    about = {**run.about, "environment_changes": [*changes, change]}
    run.store.put(RUN, json.dumps(about, indent=1).encode())
    return Run(run.store, about)


def remember_data(run: Run) -> None:
    """Write into ``run.json`` where the run's data set is now (``about``: data, data_root), if it says otherwise."""
    stored = json.loads(run.store.read(RUN))
    now = {key: run.about[key] for key in ("data", "data_root")}
    if stored | now != stored:
        run.store.put(RUN, json.dumps(stored | now, indent=1).encode())


def start_run(store: Store, table: pa.Table, keys: dict[str, Any], about: dict[str, Any]) -> Run:
    """Claim ``store`` for a run with ``run.json``, which only one process can, then write the plan it names.

    Where another process was first, its run is returned: it has the same keys and continues. Nothing of this process
    is written then. Raises FingerprintDiffers when the other run has other keys, PlanError when it has another plan
    that is not there.
    """
    data, place = _plan_file(table, keys)
    about = {
        **about,
        "fingerprint": fingerprint(keys),
        "keys": keys,
        "records": len(table),
        **place,
        "plan_sha256": hashlib.sha256(data).hexdigest(),
    }
    store.put_if_absent(RUN, json.dumps(about, indent=1).encode())
    run = find_run(store)  # read back: also where the store has no lock, everybody goes on with what stands there
    if run is None:
        raise PlanError(f"{store.uri}: {RUN} was removed while the run was planned; start again")
    if run.fingerprint != about["fingerprint"]:
        continue_run(run, keys)
    if run.about["plan_sha256"] == about["plan_sha256"]:
        store.put_if_absent(PLAN_FILE, data)
    elif not store.exists(PLAN_FILE):
        raise PlanError(
            f"{store.uri}: claimed by a process that has not written its plan, of other images than are there now; "
            f"start again, and remove the folder if that does not help"
        )
    return run


def _plan_file(table: pa.Table, keys: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """The bytes of the plan's file, one row group per shard (several where there would be too many), and what
    ``run.json`` says of it. Its footer, which workers check, is of this plan alone: it has the digest of all ids and
    the fingerprint, which covers what ids do not, the seed for one."""
    shards = table["shard"].to_numpy()
    starts = np.flatnonzero(np.diff(shards, prepend=-1))
    together = -(-len(starts) // ROW_GROUPS)
    sink = io.BytesIO()
    # without statistics, which nobody asks and which would be most of the footer
    options: dict[str, Any] = {"compression": "zstd", "write_statistics": False, "write_page_checksum": True}
    with pq.ParquetWriter(sink, PLAN, **options) as writer:
        for begin in range(0, len(starts), together):
            start, end = starts[begin], (*starts[begin + together : begin + together + 1], len(table))[0]
            writer.write_table(table.slice(start, end - start).cast(PLAN), row_group_size=end - start)
        writer.add_key_value_metadata({"ids": _digest_of(table["record_id"]), "fingerprint": fingerprint(keys)})
    data = sink.getvalue()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    return data, {
        "shards": len(starts),
        "shards_per_row_group": together,
        "plan_footer": {"start": footer, "stop": len(data), "sha256": hashlib.sha256(data[footer:]).hexdigest()},
    }


def _digest_of(ids: pa.ChunkedArray) -> str:
    found = hashlib.sha256()
    for start in range(0, len(ids), 1 << 16):
        found.update("".join(ids.slice(start, 1 << 16).to_pylist()).encode())
    return found.hexdigest()
