"""The plan: every record, its shard and its seed, written down before the first GPU second is spent.

``run.json`` guards it: going on with anything that would change a pixel is refused, by name.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from diffva_ray.config import GenerateConfig, Recipe, fingerprint, fingerprint_difference, first_error, make_recipe
from diffva_ray.data.films import Dataset
from diffva_ray.schema import PLAN, SCHEMA_VERSION, record_id, record_seed
from diffva_ray.storage import Store

RUN, PLAN_FILE, SUCCESS = "run.json", "plan.parquet", "_SUCCESS"
FOLDERS = ("counterfactuals", "maps", "reconstructions")  # the images of a record, one file each
ENVIRONMENT = ("torch", "device")  # may be changed on request; everything else may not
SWEPT = ("strength", "guidance_scale", "num_inference_steps", "scheduler", "method", "prompt")


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


class Unfinished(Exception):
    """A run that cannot be worked on; the message is one line."""


def part(shard: int) -> str:
    """``part-00012``: the name that everything of one shard carries."""
    return f"part-{shard:05d}"


@dataclass(frozen=True)
class Request:
    """What is asked for: which films, which prompt, what is swept. ``classes`` None: all but the healthy one."""

    classes: tuple[str, ...] | None = None
    prompt: str | None = None
    limit: int | None = None
    sweep: tuple[tuple[str, tuple[Any, ...]], ...] = ()


def parse_sweep(texts: Iterable[str]) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    """``strength=0.3,0.55`` -> (("strength", (0.3, 0.55)),). PlanError names a key that cannot be swept."""
    sweep = []
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or key not in SWEPT:
            raise PlanError(f"--sweep {text}: write key=value,value with key one of {', '.join(SWEPT)}")
        kind = {"strength": float, "guidance_scale": float, "num_inference_steps": int}.get(key, str)
        try:
            sweep.append((key, tuple(kind(value) for value in values.split(","))))
        except ValueError:
            raise PlanError(f"--sweep {text}: {key} takes numbers") from None
    return tuple(sweep)


def make_plan(dataset: Dataset, recipe: Recipe, request: Request) -> pa.Table:
    """One row per film, sweep point and draw, in the order of settings and record id, cut into shards of one setting.

    Sorting by id spreads classes and storage keys evenly over shards. Raises PlanError when nothing is left to do.
    """
    config, rows = recipe.generate, list[dict[str, Any]]()
    for point in itertools.product(*(values for _, values in request.sweep)):
        swept = dict(zip((key for key, _ in request.sweep), point, strict=True))
        prompt = swept.pop("prompt", request.prompt if request.prompt is not None else recipe.data.healthy_prompt)
        settings = {key: swept.get(key, getattr(config, key)) for key in SWEPT if key != "prompt"}
        check_settings(config, settings)
        method = settings.pop("method")
        for film, draw in itertools.product(dataset.films, range(config.draws)):
            rows.append(
                {
                    "record_id": record_id(film.path, film.label, prompt, method, {**settings, "draw": draw}),
                    "source_path": film.path,
                    "source_size": film.size,
                    "label": film.label,
                    "prompt": prompt,
                    "method": method,
                    **settings,
                    "seed": record_seed(recipe.seed, film.path, draw),
                    "draw": draw,
                    "lung_mask_path": film.lung_mask,
                    "lesion_mask_path": film.lesion_mask,
                    "twin_path": film.twin,
                }
            )
    if not rows:
        raise PlanError("no film is left to plan")
    rows.sort(key=lambda row: row["record_id"])
    table = pa.Table.from_pylist(cut(rows[: request.limit], recipe), schema=PLAN)
    if len(table["record_id"].unique()) != len(table):
        raise PlanError("the data set names a film twice under one label")
    return table


def cut(rows: Iterable[dict[str, Any]], recipe: Recipe) -> list[dict[str, Any]]:
    """The rows in the order of settings and record id, each with its ``shard`` and its ``position`` in it. A shard
    holds records of one setting: they go through the networks together."""

    def setting(row: dict[str, Any]) -> tuple[Any, ...]:
        return (row["method"], *(row[key] for key in SWEPT if key not in ("method", "prompt")))

    size, shard, ordered = recipe.generate.shard_size, -1, []
    by_setting = sorted(rows, key=lambda row: (setting(row), row["record_id"]))
    for _, members in itertools.groupby(by_setting, key=setting):
        for number, row in enumerate(members):
            shard += number % size == 0
            ordered.append({**row, "shard": shard, "position": number % size})
    return ordered


def check_settings(config: GenerateConfig, settings: dict[str, Any]) -> None:
    """PlanError for settings that no film could be generated with, whether swept or from the recipe."""
    try:
        checked = GenerateConfig.model_validate({**config.model_dump(), **settings})
    except ValidationError as error:
        raise PlanError(first_error(error)) from None
    if int(checked.num_inference_steps * checked.strength) < 1:
        raise PlanError(
            f"strength {checked.strength:g} of {checked.num_inference_steps} steps leaves no step to do; raise one of "
            "them"
        )
    if checked.method not in ("sdedit", "controlnet") and checked.scheduler != "ddim":
        raise PlanError(
            f"method {checked.method} runs with scheduler ddim, not {checked.scheduler}; give --scheduler ddim or "
            "--method sdedit"
        )


def pixel_keys(recipe: Recipe, request: Request, model_digest: str, torch: str, device: str) -> dict[str, Any]:
    """Everything that changes a pixel or the set of records, by name: what the fingerprint is taken of."""
    prompt = request.prompt if request.prompt is not None else recipe.data.healthy_prompt
    return json.loads(
        json.dumps(
            {
                **recipe.generate.model_dump(mode="json"),
                "model_digest": model_digest,
                "resolution": recipe.model.resolution,
                "aspect": "squash",
                "seed": recipe.seed,
                "prompt": prompt,
                "classes": request.classes,
                "limit": request.limit,
                "sweep": request.sweep,
                "schema_version": SCHEMA_VERSION,
                "torch": torch,
                "device": device,
            }
        )
    )


@dataclass(frozen=True)
class Run:
    """A planned run, as ``run.json`` has it."""

    store: Store
    about: dict[str, Any]

    @cached_property
    def recipe(self) -> Recipe:
        return make_recipe(self.about["recipe"])

    @property
    def fingerprint(self) -> str:
        return str(self.about["fingerprint"])

    @property
    def shards(self) -> int:
        return int(self.about["shards"])

    @cached_property
    def _plan(self) -> bytes:
        data = self.store.read(PLAN_FILE)
        if hashlib.sha256(data).hexdigest() != self.about["plan_sha256"]:
            raise PlanError(f"{self.store.uri}/{PLAN_FILE} is not the plan that {RUN} was written for")
        return data

    def plan(self) -> pa.Table:
        """The whole plan. Raises PlanError when it is not the one ``run.json`` was written for."""
        return pq.read_table(io.BytesIO(self._plan))

    def shard_rows(self, shard: int) -> list[dict[str, Any]]:
        """The planned records of one shard: the plan keeps one row group per shard."""
        return pq.ParquetFile(io.BytesIO(self._plan)).read_row_group(shard).to_pylist()

    def shard_sizes(self) -> list[int]:
        """Number of records of each shard."""
        metadata = pq.ParquetFile(io.BytesIO(self._plan)).metadata
        return [metadata.row_group(shard).num_rows for shard in range(metadata.num_row_groups)]

    def done(self) -> set[int]:
        """Committed shards, from one listing."""
        return {
            int(name[len("records/part-") : -len(".parquet")])
            for name, _ in self.store.list("records")
            if name.startswith("records/part-") and name.endswith(".parquet")
        }

    def pending(self) -> list[int]:
        done = self.done()
        return [shard for shard in range(self.shards) if shard not in done]


def open_run(store: Store) -> Run | None:
    """The run at ``store``, or None when nothing has been planned there."""
    try:
        return Run(store, json.loads(store.read(RUN)))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except json.JSONDecodeError as error:
        raise ValueError(f"{store.uri}/{RUN} is damaged ({error})") from None


def continue_run(run: Run, keys: dict[str, Any], allow_environment_change: bool = False) -> Run:
    """The same run, if ``keys`` are the ones it was planned with. Raises FingerprintDiffers; a permitted change of
    environment is recorded in ``run.json``."""
    old = run.about["keys"]
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


def start_run(store: Store, table: pa.Table, keys: dict[str, Any], about: dict[str, Any]) -> Run:
    """Write the plan, one row group per shard, then ``run.json``."""
    sink = io.BytesIO()
    shards = table["shard"].to_pylist()
    starts = [at for at, shard in enumerate(shards) if at == 0 or shard != shards[at - 1]]
    with pq.ParquetWriter(sink, PLAN, compression="zstd") as writer:
        for start, end in zip(starts, [*starts[1:], len(shards)], strict=True):
            writer.write_table(table.slice(start, end - start), row_group_size=end - start)
    data = sink.getvalue()
    store.put(PLAN_FILE, data)
    about = {
        "fingerprint": fingerprint(keys),
        "keys": keys,
        "records": len(table),
        "shards": len(starts),
        "plan_sha256": hashlib.sha256(data).hexdigest(),
        **about,
    }
    if not store.put_if_absent(RUN, json.dumps(about, indent=1).encode()):
        raise PlanError(f"{store.uri}: another process planned this run just now; start again to continue it")
    return Run(store, about)
