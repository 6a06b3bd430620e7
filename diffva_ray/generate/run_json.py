"""Reads and checks ``run.json``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, NonNegativeInt, PositiveInt, ValidationError

from diffva_ray.config.recipe import first_error
from diffva_ray.progress import one_line
from diffva_ray.schema import SCHEMA_VERSION
from diffva_ray.storage.store import Store

RUN, OVERLAYS = "run.json", "overlays"


class DamagedRun(ValueError):
    """``run.json`` cannot be read; the message is one line."""


class _PlanFooter(BaseModel):
    start: NonNegativeInt
    stop: NonNegativeInt
    sha256: str


class _Keys(BaseModel):
    """The keys of the fingerprint that every run has; the settings of ``generate`` have defaults."""

    model_digest: str
    seed: int
    prompt: str
    resolution: int
    sweep: list[Any]
    torch: str
    device: str


class _Judge(BaseModel):
    classes: list[str]
    calibration: dict[str, float] | None = None


class _RunJson(BaseModel):
    """The entries of ``run.json`` that reading a run depends on, as checked when it is opened."""

    fingerprint: str
    keys: _Keys
    recipe: dict[str, Any]
    records: PositiveInt
    shards: PositiveInt
    shards_per_row_group: PositiveInt = 1
    plan_sha256: str
    plan_footer: _PlanFooter | None = None
    data: str
    data_root: str
    data_sample: dict[str, str] = {}
    model: str = ""
    columns: list[str] = []
    judge: _Judge | None = None
    environment_changes: list[dict[str, Any]] = []
    versions: dict[str, Any] = {}
    machine: dict[str, Any] = {}


def read_run_json(store: Store) -> dict[str, Any] | None:
    """The content of ``run.json``, or None without one. Raises DamagedRun for one that cannot be read."""
    try:
        about = json.loads(store.read(RUN))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:
        raise _damaged(store, one_line(error, 120)) from None
    if not isinstance(about, dict):
        raise _damaged(store, "not a JSON object")
    keys = about.get("keys")
    version = keys.get("schema_version") if isinstance(keys, dict) else None
    if isinstance(version, int) and version < SCHEMA_VERSION:
        raise DamagedRun(
            f"{store.uri}: a run of an earlier version (schema {version}), whose files and columns have other names; "
            "choose another folder and generate it again"
        )
    try:
        _RunJson.model_validate(about)
    except ValidationError as error:
        raise _damaged(store, one_line(first_error(error), 120)) from None
    return about


def check_layout(store: Store, about: Mapping[str, Any], records: int, shards: int) -> None:
    """Raises DamagedRun when ``run.json`` has other numbers of records and shards than the plan that it names."""
    if (about["records"], about["shards"]) != (records, shards):
        raise _damaged(store, f"{about['records']} records in {about['shards']} shards, {records} in {shards} planned")


def base_uri(store: Store) -> str:
    """The address of a run, or of the run that a retry belongs to."""
    return store.uri.partition(f"/{OVERLAYS}/")[0]


def repair_command(store: Store, lost: bool = False) -> str:
    """What writes a damaged (or ``lost``) file of a run or of a retry again."""
    base = shlex.quote(base_uri(store))
    if base_uri(store) != store.uri:
        return f"run diffva verify {base} --repair, then diffva retry, to write it again"
    again = "the run's own diffva generate command again to write it"
    return f"give {again}" if lost else f"run diffva verify {base} --repair, then give {again}"


def _damaged(store: Store, reason: str) -> DamagedRun:
    overlay = base_uri(store) != store.uri
    mend = repair_command(store) if overlay else f"delete that file and {repair_command(store, lost=True)}"
    return DamagedRun(f"{store.uri}/{RUN} is damaged ({reason}); {mend}")
