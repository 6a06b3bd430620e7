"""The plan: every record, its shard and its seed, written down before the first GPU second is spent.

``run.json`` guards it: going on with anything that would change a pixel is refused, by name.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import ValidationError

from diffva_ray.config import (
    GUESS,
    GenerateConfig,
    Recipe,
    fingerprint,
    fingerprint_difference,
    first_error,
    make_recipe,
)
from diffva_ray.data.films import Dataset
from diffva_ray.methods import METHODS
from diffva_ray.schema import PLAN, record_id, record_seed
from diffva_ray.storage import Ranges, Store

RUN, PLAN_FILE, SUCCESS = "run.json", "plan.parquet", "_SUCCESS"
FOLDERS = ("counterfactuals", "maps", "reconstructions")  # the images of a record, one file each
ENVIRONMENT = ("torch", "device", "engine")  # may be changed on request; everything else may not
ROW_GROUPS = 4096  # at most, or the footer, which every worker reads, would grow with the run
SWEPT = ("strength", "guidance_scale", "num_inference_steps", "scheduler", "method", "prompt")
OF_A_SHARD = ("method", "strength", "guidance_scale", "num_inference_steps", "scheduler")  # the same in all its records


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


class PromptTooLong(PlanError):
    """A prompt that the model would cut."""


class DamagedRun(ValueError):
    """``run.json`` cannot be read; the message is one line."""


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
    sweep: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or key not in SWEPT:
            raise PlanError(f"--sweep {text}: write key=value,value with key one of {', '.join(SWEPT)}")
        if key in sweep:
            raise PlanError(f"--sweep {text}: {key} is swept already; write all its values in one --sweep {key}=…,…")
        kind = {"strength": float, "guidance_scale": float, "num_inference_steps": int}.get(key, str)
        try:
            sweep[key] = tuple(kind(value) for value in values.split(","))
        except ValueError:
            raise PlanError(f"--sweep {text}: {key} takes numbers") from None
        if len(set(sweep[key])) < len(sweep[key]):
            raise PlanError(f"--sweep {text}: a value stands there twice")
    return tuple(sweep.items())


def make_plan(dataset: Dataset, recipe: Recipe, request: Request) -> pa.Table:
    """One row per film, sweep point and draw, in the order of settings and record id, cut into shards of one setting.

    Columns are those of PLAN, texts as dictionaries, so that ten million rows fit in memory. Sorting by id spreads
    classes and storage keys evenly over shards. Raises PlanError when nothing is left to do.
    """
    config, films = recipe.generate, dataset.films
    points = _points(recipe, request)
    if not points or not films:
        raise PlanError("no film is left to plan")
    draws, total = config.draws, len(points) * len(films) * config.draws
    names = (
        record_id(film.path, film.label, point["prompt"], point["method"], {**_id_settings(point), "draw": draw})
        for point, film, draw in itertools.product(points, films, range(draws))
    )
    ids = np.fromiter(names, "S20", total)
    place = np.argsort(ids, kind="stable")
    if (ids[place[1:]] == ids[place[:-1]]).any():
        raise PlanError("the data set names a film twice under one label")
    place = place[: request.limit]

    keys = [_setting(point) for point in points]
    rank = np.array([sorted(set(keys)).index(key) for key in keys])[place // (len(films) * draws)]
    place = place[np.argsort(rank, kind="stable")]  # of one setting, they stay in the order of ids
    shard, position = cut(np.sort(rank), config.shard_size)
    point_of, film_of, draw_of = np.unravel_index(place, (len(points), len(films), draws))

    seeds = np.fromiter(
        (record_seed(recipe.seed, film.path, draw) for film, draw in itertools.product(films, range(draws))),
        np.int64, len(films) * draws,
    )  # fmt: skip
    columns = {
        "record_id": pa.array(ids[place]).cast(pa.string()),
        "shard": pa.array(shard, pa.int32()),
        "position": pa.array(position, pa.int32()),
        "seed": pa.array(seeds[film_of * draws + draw_of]),
        "draw": pa.array(draw_of, pa.int32()),
    }
    for name in PLAN.names:
        if name in OF_A_FILM:
            columns[name] = _spread([getattr(film, OF_A_FILM[name]) for film in films], film_of, name)
        elif name in SWEPT:
            columns[name] = _spread([point[name] for point in points], point_of, name)
    return pa.table({name: columns[name] for name in PLAN.names})


OF_A_FILM = {
    "source_path": "path", "source_size": "size", "label": "label", "lung_mask_path": "lung_mask",
    "lesion_mask_path": "lesion_mask", "twin_path": "twin",
}  # fmt: skip


def _spread(values: list[Any], of: NDArray[np.int64], name: str) -> pa.Array:
    """``values[of]`` as a column of PLAN; texts stay a dictionary and indices."""
    column = pa.array(values, PLAN.field(name).type)
    return (column.dictionary_encode() if pa.types.is_string(column.type) else column).take(pa.array(of))


def _points(recipe: Recipe, request: Request) -> list[dict[str, Any]]:
    """The settings of every point of the sweep, by the names in SWEPT. Raises PlanError for those that cannot run."""
    points = []
    for values in itertools.product(*(values for _, values in request.sweep)):
        swept = dict(zip((key for key, _ in request.sweep), values, strict=True))
        prompt = swept.pop("prompt", request.prompt if request.prompt is not None else recipe.data.healthy_prompt)
        settings = {key: swept.get(key, getattr(recipe.generate, key)) for key in SWEPT if key != "prompt"}
        check_settings(recipe.generate, settings)
        points.append({"prompt": prompt, **settings})
    return points


def _id_settings(point: Mapping[str, Any]) -> dict[str, Any]:
    return {key: point[key] for key in OF_A_SHARD if key != "method"}


def _setting(point: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(point[key] for key in OF_A_SHARD)


def cut(rank: NDArray[np.int64], shard_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Shard and position in it of records [n] whose settings have the rising numbers ``rank`` [n]. A shard holds at
    most ``shard_size`` records, of one setting: they go through the networks together."""
    position = (np.arange(len(rank)) - np.searchsorted(rank, rank)) % shard_size
    return np.cumsum(position == 0) - 1, position


def cut_again(plan: pa.Table, shard_size: int) -> pa.Table:
    """Records of a plan (columns of PLAN) as a plan of their own, in the order of settings and record id."""
    plan = plan.sort_by([(key, "ascending") for key in (*OF_A_SHARD, "record_id")])
    settings = list(zip(*(plan[key].to_pylist() for key in OF_A_SHARD)))
    rank = np.cumsum([0, *(before != after for before, after in itertools.pairwise(settings))])
    for name, values in zip(("shard", "position"), cut(rank, shard_size)):
        plan = plan.set_column(PLAN.get_field_index(name), PLAN.field(name), pa.array(values, pa.int32()))
    return plan


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
    method = METHODS[checked.method]
    if checked.acceleration.on and (
        not method.shortcuts or (checked.method == "masked" and checked.masked.source != "difference")
    ):
        raise PlanError(
            f"generate.acceleration: method {checked.method} has no shortcuts; they are for "
            f"{', '.join(name for name, method in METHODS.items() if method.shortcuts)} (by difference)"
        )
    if checked.compile and checked.acceleration.deep_features_every > 1:
        raise PlanError("generate.compile: a compiled UNet cannot keep its deep features; set deep_features_every to 1")
    if not method.reads_prompt and checked.source_prompt == GUESS:
        raise PlanError(
            f"method {checked.method} reads no prompt, and guessing one costs network calls; give "
            '--set generate.source_prompt=""'
        )
    if checked.scheduler != (only := method.scheduler or checked.scheduler):
        raise PlanError(
            f"method {checked.method} runs with scheduler {only}, not {checked.scheduler}; give --scheduler {only} or "
            "--method sdedit"
        )


@dataclass(frozen=True)
class Run:
    """A planned run: where it is, and ``run.json`` (``about``). ``pipeline.existing_run("runs/first")`` opens one.

    Reading the plan raises PlanError where it is not the one that ``run.json`` was written for.
    """

    store: Store
    about: dict[str, Any]

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
        return {"timestep_spacing": "leading", **stored, **settings}

    @property
    def shards(self) -> int:
        """Number of planned shards."""
        return int(self.about["shards"])

    def plan(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The whole plan (columns of ``schema.PLAN``), or some of its columns."""
        data = self.store.read(PLAN_FILE)
        if hashlib.sha256(data).hexdigest() != self.about["plan_sha256"]:
            raise self._another_plan()
        return pq.read_table(io.BytesIO(data), columns=columns)

    @cached_property
    def _footer(self) -> pq.FileMetaData:
        """The plan's footer, which holds the digest of all ids, and is checked."""
        place = self.about["plan_footer"]
        tail = self.store.read_range(PLAN_FILE, place["start"], place["stop"])
        if hashlib.sha256(tail).hexdigest() != place["sha256"]:
            raise self._another_plan()
        return pq.read_metadata(io.BytesIO(tail))

    @cached_property
    def _whole(self) -> bytes:
        return self.store.read(PLAN_FILE)

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


def open_run(store: Store) -> Run | None:
    """The run at ``store``, or None when nothing has been planned there."""
    try:
        return Run(store, json.loads(store.read(RUN)))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except json.JSONDecodeError as error:
        raise DamagedRun(f"{store.uri}/{RUN} is damaged ({error})") from None


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


def start_run(store: Store, table: pa.Table, keys: dict[str, Any], about: dict[str, Any]) -> Run:
    """Write the plan, one row group per shard (several where there would be too many), then ``run.json``."""
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
        writer.add_key_value_metadata({"ids": _digest_of(table["record_id"])})
    data = sink.getvalue()
    store.put(PLAN_FILE, data)
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    about = {
        **about,
        "fingerprint": fingerprint(keys),
        "keys": keys,
        "records": len(table),
        "shards": len(starts),
        "shards_per_row_group": together,
        "plan_sha256": hashlib.sha256(data).hexdigest(),
        "plan_footer": {"start": footer, "stop": len(data), "sha256": hashlib.sha256(data[footer:]).hexdigest()},
    }
    if not store.put_if_absent(RUN, json.dumps(about, indent=1).encode()):
        raise PlanError(f"{store.uri}: another process planned this run just now; start again to continue it")
    return Run(store, about)


def _digest_of(ids: pa.ChunkedArray) -> str:
    found = hashlib.sha256()
    for start in range(0, len(ids), 1 << 16):
        found.update("".join(ids.slice(start, 1 << 16).to_pylist()).encode())
    return found.hexdigest()
