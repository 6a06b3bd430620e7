"""A run on disk: ``run.json``, the plan, and which shards are done or pending.

``run.json`` guards the run: continuing it with anything that would change a pixel is refused, naming what differs.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from diffva_ray.config.recipe import (
    GenerateConfig,
    Recipe,
    RecipeError,
    fingerprint,
    fingerprint_difference,
    first_error,
    make_recipe,
)
from diffva_ray.data.dataset import UnusableData
from diffva_ray.generate.planned_files import PlannedFiles
from diffva_ray.generate.run_json import RUN, DamagedRun, read_run_json, repair_command
from diffva_ray.schema import PLAN, RECORDS, PlannedRecord, with_columns
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import Ranges, Store

PLAN_FILE, SUCCESS = "plan.parquet", "_SUCCESS"
FOLDERS = ("counterfactuals", "attributions", "reconstructions")  # the images of a record, one file each
ENVIRONMENT = ("torch", "device", "engine")  # keys that --allow-environment-change may change
DEVICE_NAME = "device_name"  # likewise, but the first worker sets it: the driver may have another device
DEVICE_FILE = "device.json"  # in the run's folder; has the DEVICE_NAME
MAX_ROW_GROUPS = 4096  # of the plan file; keeps its footer small, which every worker reads
PART = re.compile(r"records/part-(\d{5,})\.parquet")  # anything else in records/ is no part of the run


NAMED = 5  # keys that a message names


class FingerprintDiffers(Exception):
    """The run was planned with another configuration; ``keys`` are the keys that differ."""

    def __init__(self, uri: str, keys: Sequence[str], old: dict[str, Any], new: dict[str, Any]) -> None:
        self.uri, self.keys, self.old, self.new = uri, list(keys), dict(old), dict(new)
        changes = "; ".join(f"{key}: {old.get(key)!r} there, {new.get(key)!r} now" for key in keys[:NAMED])
        changes += f"; and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
        only_environment = set(keys) <= {*ENVIRONMENT, DEVICE_NAME}
        hint = "--allow-environment-change continues all the same" if only_environment else "choose another --out"
        super().__init__(f"{uri} was made with another configuration ({changes}); {hint}")

    def __reduce__(self) -> tuple[Any, ...]:  # it comes from a worker
        return FingerprintDiffers, (self.uri, self.keys, self.old, self.new)


class PlanError(ValueError):
    """A plan cannot be made or read; the message is one line that names the option at fault."""


class DamagedPart(Exception):
    """A committed part cannot be read; the message is one line."""


class Unfinished(Exception):
    """A run cannot be generated; the message is one line."""


def part(shard: int) -> str:
    """The name of a shard's files and folders, such as ``part-00012``."""
    return f"part-{shard:05d}"


@dataclass(frozen=True)
class Run:
    """A planned run; ``open_run("runs/first")`` opens one.

    Methods that read the plan raise PlanError when the plan is missing or is not the one that ``run.json`` names. All
    methods that read files raise StoreError when the store fails.
    """

    store: Store  # the run's folder
    about: dict[str, Any]  # the content of run.json

    @cached_property
    def data(self) -> Store:
        """The store with the input images.

        Raises:
            UnknownScheme: No store is known for the scheme of the address.
        """
        # Not from the cache of the process: a client there keeps the credentials and the endpoint of an hour ago.
        return open_store(self.about["data_root"])

    @cached_property
    def files(self) -> PlannedFiles:
        """The data set's files as they were when the run was planned."""
        return PlannedFiles.of(self.about, self.data)

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe that the run was planned with.

        Raises:
            RecipeError: This version cannot read the recipe, or it is damaged.
        """
        try:
            return make_recipe(self.about["recipe"])
        except RecipeError as error:
            raise RecipeError(f"{self.store.uri}/{RUN}: its recipe cannot be read ({error})") from None

    @property
    def fingerprint(self) -> str:
        """Digest of the keys at the time of planning: 16 hex digits."""
        return str(self.about["fingerprint"])

    @cached_property
    def keys(self) -> dict[str, Any]:
        """The keys of the fingerprint and their values.

        Settings that did not exist when the run was planned have their defaults; the timesteps of such a run are
        spaced "leading", its networks are not compiled, and 16 is the bit depth of its images.
        """
        stored = {"compile": False, **self.about["keys"]}
        generate = {key: value for key, value in stored.items() if key in GenerateConfig.model_fields}
        try:
            settings = GenerateConfig.model_validate(generate).model_dump(mode="json")
        except ValidationError as error:
            raise DamagedRun(f"{self.store.uri}/{RUN} is damaged (keys: {first_error(error)})") from None
        return {"timestep_spacing": "leading", "bits": 16, **stored, **settings}

    @cached_property
    def records_schema(self) -> pa.Schema:
        """The columns of the records: those of ``schema.RECORDS``, then further ones of the data set."""
        return with_columns(RECORDS, self.about.get("columns", ()))

    @property
    def shards(self) -> int:
        """Number of planned shards."""
        return int(self.about["shards"])

    def plan(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Read the plan.

        Args:
            columns: Names of columns of ``schema.PLAN``; None: all.

        Returns:
            One row per planned record, in the order of shard and position.

        Raises:
            PlanError: The plan is missing, or is not the one that ``run.json`` names.
        """
        data = self._read_plan()
        if hashlib.sha256(data).hexdigest() != self.about["plan_sha256"]:
            raise self._wrong_plan()
        return pq.read_table(io.BytesIO(data), columns=columns)

    def has_plan(self) -> bool:
        """Whether the plan is there and sound, as far as its footer and its column of shards tell."""
        try:
            return len(self.shard_sizes()) == self.shards
        except PlanError:
            return False

    @cached_property
    def _footer(self) -> pq.FileMetaData:
        """The checked footer of the plan file; it holds the digest of all record ids."""
        footer = self.about["plan_footer"]
        with self._plan_required():
            tail = self.store.read_range(PLAN_FILE, footer["start"], footer["stop"])
        if hashlib.sha256(tail).hexdigest() != footer["sha256"]:
            raise self._wrong_plan()
        return pq.read_metadata(io.BytesIO(tail))

    def _read_plan(self) -> bytes:
        with self._plan_required():
            return self.store.read(PLAN_FILE)

    @contextmanager
    def _plan_required(self) -> Iterator[None]:
        """Turn errors into PlanError: the run was claimed, but its plan is not written (yet), or is damaged."""
        try:
            yield
        except FileNotFoundError:
            raise PlanError(
                f"{self.store.uri}/{PLAN_FILE} is missing; {repair_command(self.store, lost=True)}"
            ) from None
        except (OSError, pa.ArrowException):
            raise self._wrong_plan() from None

    def _open_plan(self) -> pq.ParquetFile:
        """Open the plan file; only requested ranges are read, and pages have checksums.

        Every reader opens the file anew, because threads that share a ParquetFile crash."""
        if not self.about.get("plan_footer"):  # planned by an earlier version
            return pq.ParquetFile(io.BytesIO(self._read_plan()))
        ranges = Ranges(self.store, PLAN_FILE, self.about["plan_footer"]["stop"])
        return pq.ParquetFile(ranges, metadata=self._footer, pre_buffer=True, page_checksum_verification=True)

    def _wrong_plan(self) -> PlanError:
        return PlanError(
            f"{self.store.uri}/{PLAN_FILE} is not the plan that {RUN} was written for; {repair_command(self.store)}"
        )

    def planned(self, shard: int) -> list[PlannedRecord]:
        """Read the planned records of one shard; only the row group with this shard is read.

        Args:
            shard: Number of the shard.

        Returns:
            The records, in the order of their position.

        Raises:
            PlanError: The plan is missing, or is not the one that ``run.json`` names.
        """
        with self._plan_required():
            group = self._open_plan().read_row_group(shard // self.about.get("shards_per_row_group", 1))
        planned: list[PlannedRecord] = group.filter(pc.equal(group["shard"], shard)).to_pylist()
        return planned

    def shard_sizes(self) -> list[int]:
        """Number of records of each shard. Raises PlanError as ``plan``."""
        with self._plan_required():
            shards = self._open_plan().read(["shard"])["shard"]
        sizes: list[int] = np.bincount(shards, minlength=self.shards).tolist()
        return sizes

    def done(self) -> set[int]:
        """Numbers of the committed shards, from one listing of the store."""
        return {int(name[1]) for path, _ in self.store.list("records") if (name := PART.fullmatch(path))}

    def pending(self) -> list[int]:
        """Numbers of the planned shards that are not committed, in ascending order."""
        done = self.done()
        return [shard for shard in range(self.shards) if shard not in done]


def open_run(uri: str) -> Run:
    """Open an existing run for reading.

    Args:
        uri: A folder or an address such as ``s3://bucket/runs/first``.

    Returns:
        The run; nothing is written.

    Raises:
        UnusableData: No run was planned there, ``run.json`` is damaged, or the scheme of ``uri`` is unknown.
        StoreError: The store fails.
    """
    try:
        run = find_run(open_store(uri))
    except ValueError as error:
        raise UnusableData(str(error)) from None
    if run is None:
        raise UnusableData(f"{uri}: no run there (no run.json); make one with diffva generate")
    return run


def find_run(store: Store) -> Run | None:
    """The run at ``store``, or None without ``run.json``. Raises DamagedRun for one that cannot be read."""
    about = read_run_json(store)
    return None if about is None else Run(store, about)


def continue_run(run: Run, keys: dict[str, Any], allow_environment_change: bool = False) -> Run:
    """The same run if its keys equal ``keys``, else raises FingerprintDiffers.

    A permitted change of the environment is recorded in ``run.json``."""
    old = run.keys
    different = fingerprint_difference(old, keys)
    if not different:
        return run
    if not allow_environment_change or not set(different) <= set(ENVIRONMENT):
        raise FingerprintDiffers(run.store.uri, different, old, keys)
    return record_change(run, {key: keys[key] for key in ENVIRONMENT})


def record_change(run: Run, change: dict[str, Any]) -> Run:
    """The same run, whose ``run.json`` lists a permitted change of the environment, once."""
    changes = run.about.get("environment_changes", [])
    if change in changes:
        return run
    about = {**run.about, "environment_changes": [*changes, change]}
    run.store.put(RUN, json.dumps(about, indent=1).encode())
    return Run(run.store, about)


def remember_data(run: Run) -> None:
    """Write the current address of the data set (``about``: data, data_root) into ``run.json`` if it has changed."""
    stored = json.loads(run.store.read(RUN))
    current = {key: run.about[key] for key in ("data", "data_root")}
    if stored | current != stored:
        run.store.put(RUN, json.dumps(stored | current, indent=1).encode())


def start_run(store: Store, table: pa.Table, keys: dict[str, Any], about: dict[str, Any]) -> Run:
    """Claim ``store`` for a run by writing ``run.json``, which only one process can do, then write the plan.

    If another process was first, its run is returned and nothing is written; it has the same keys. Raises
    FingerprintDiffers when the other run has other keys, PlanError when it has another plan that is not written.
    """
    data, layout = _plan_file(table, keys)
    about = {
        **about,
        "fingerprint": fingerprint(keys),
        "keys": keys,
        "records": len(table),
        **layout,
        "plan_sha256": hashlib.sha256(data).hexdigest(),
    }
    _check_vacant(store, fingerprint(keys))
    if store.put_if_absent(RUN, json.dumps(about, indent=1).encode()):
        store.delete(SUCCESS)  # of a run.json that was lost
    run = find_run(store)  # read it back: without a lock in the store, every process uses the stored one
    if run is None:
        raise PlanError(f"{store.uri}: {RUN} was removed while the run was planned; give the command again")
    if run.fingerprint != about["fingerprint"]:
        continue_run(run, keys)
    if store.exists(PLAN_FILE) and run.has_plan():
        return run
    if run.about["plan_sha256"] != about["plan_sha256"]:
        raise PlanError(
            f"{store.uri}/{PLAN_FILE} is missing or damaged, and the images have changed since the run was planned, so "
            "that it cannot be written again; restore the images, or name another --out"
        )
    store.put(PLAN_FILE, data)  # the same bytes from every process
    return run


def _check_vacant(store: Store, expected: str) -> None:
    """Raises PlanError when ``store`` has lost its ``run.json`` and holds a part of another run."""
    parts = [] if store.exists(RUN) else [path for path, _ in store.list("records") if PART.fullmatch(path)]
    for path in parts[:1]:
        with suppress(OSError, pa.ArrowException):  # a damaged part tells nothing
            metadata = pq.read_schema(io.BytesIO(store.read(path))).metadata or {}
            if (found := metadata.get(b"fingerprint", b"").decode()) != expected:
                raise PlanError(
                    f"{store.uri}: holds records of another run (fingerprint {found}, this one's {expected}), whose "
                    f"{RUN} is missing; give that run's own diffva generate command, or another --out"
                )


def _plan_file(table: pa.Table, keys: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """The bytes of the plan file, and its entries in ``run.json``.

    Each row group holds one shard, or several when there would be more than MAX_ROW_GROUPS. The footer, which workers
    check, identifies the plan: it has the digest of all record ids, and the fingerprint for what the ids do not cover,
    such as the seed."""
    shards = table["shard"].to_numpy()
    starts = np.flatnonzero(np.diff(shards, prepend=-1))
    shards_per_group = -(-len(starts) // MAX_ROW_GROUPS)
    sink = io.BytesIO()
    # statistics are never read and would be most of the footer
    options: dict[str, Any] = {"compression": "zstd", "write_statistics": False, "write_page_checksum": True}
    columns = [name for name in table.column_names if name not in PLAN.names]
    schema = with_columns(PLAN, columns)
    with pq.ParquetWriter(sink, schema, **options) as writer:
        for first in range(0, len(starts), shards_per_group):
            start, end = starts[first], (*starts[first + shards_per_group :][:1], len(table))[0]
            writer.write_table(table.slice(start, end - start).cast(schema), row_group_size=end - start)
        writer.add_key_value_metadata({"ids": _digest_of(table["record_id"]), "fingerprint": fingerprint(keys)})
    data = sink.getvalue()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    return data, {
        "columns": columns,
        "shards": len(starts),
        "shards_per_row_group": shards_per_group,
        "plan_footer": {"start": footer, "stop": len(data), "sha256": hashlib.sha256(data[footer:]).hexdigest()},
    }


def _digest_of(ids: pa.ChunkedArray) -> str:
    sha256 = hashlib.sha256()
    for start in range(0, len(ids), 1 << 16):
        sha256.update("".join(ids.slice(start, 1 << 16).to_pylist()).encode())
    return sha256.hexdigest()
