"""The plan: every record, its shard and its seed, written down before the first GPU second is spent."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import ValidationError

from diffva_ray.config.methods import METHODS
from diffva_ray.config.recipe import (
    GUESS,
    GenerateConfig,
    Recipe,
    first_error,
)
from diffva_ray.data.dataset import Dataset, LabelledImage
from diffva_ray.generate.run import PlanError
from diffva_ray.schema import PLAN, digest, record_id, record_seed

SWEPT = ("strength", "guidance_scale", "num_inference_steps", "scheduler", "method", "prompt")
OF_A_SHARD = ("method", "strength", "guidance_scale", "num_inference_steps", "scheduler")  # the same in all its records


class PromptTooLong(PlanError):
    """A prompt that the model would cut."""


@dataclass(frozen=True)
class Request:
    """What is asked for: which images, which prompt, what is swept. ``classes`` None: all but the healthy one."""

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
    """One row per image, sweep point and sample, in the order of settings and record id, cut into shards of one
    setting.

    Columns are those of PLAN, texts as dictionaries, so that ten million rows fit in memory. Sorting by id spreads
    classes and storage keys evenly over shards. Raises PlanError when nothing is left to do.
    """
    config, images = recipe.generate, dataset.images
    points = _points(recipe, request)
    if not points or not images:
        raise PlanError("no image is left to plan")
    samples, total = config.samples, len(points) * len(images) * config.samples
    names = (
        record_id(image.path, image.label, point["prompt"], point["method"], {**_id_settings(point), "draw": sample})
        for point, image, sample in itertools.product(points, images, range(samples))
    )
    ids = np.fromiter(names, "S20", total)
    place = np.argsort(ids, kind="stable")
    if (ids[place[1:]] == ids[place[:-1]]).any():
        raise PlanError("the data set names an image twice under one label")
    if request.limit is not None:
        place = place[_limited(images, len(points), samples, request.limit)[place]]

    keys = [_setting(point) for point in points]
    rank = np.array([sorted(set(keys)).index(key) for key in keys])[place // (len(images) * samples)]
    place = place[np.argsort(rank, kind="stable")]  # of one setting, they stay in the order of ids
    shard, position = cut(np.sort(rank), config.shard_size)
    point_of, image_of, sample_of = np.unravel_index(place, (len(points), len(images), samples))

    seeds = np.fromiter(
        (record_seed(recipe.seed, image.path, sample) for image, sample in itertools.product(images, range(samples))),
        np.int64, len(images) * samples,
    )  # fmt: skip
    columns = {
        "record_id": pa.array(ids[place]).cast(pa.string()),
        "shard": pa.array(shard, pa.int32()),
        "position": pa.array(position, pa.int32()),
        "seed": pa.array(seeds[image_of * samples + sample_of]),
        "sample": pa.array(sample_of, pa.int32()),
    }
    for name in PLAN.names:
        if name in OF_A_IMAGE:
            columns[name] = _spread([getattr(image, OF_A_IMAGE[name]) for image in images], image_of, name)
        elif name in SWEPT:
            columns[name] = _spread([point[name] for point in points], point_of, name)
    return pa.table({name: columns[name] for name in PLAN.names})


def _limited(images: Sequence[LabelledImage], points: int, samples: int, limit: int) -> NDArray[np.bool_]:
    """Which of the records [points x images x samples] a limit leaves: those of as many images as it takes, chosen by
    the digest of path and label. So runs of other settings take the same images and can be compared, and a sweep has
    all its points of each image."""
    digests = np.array([digest([image.path, image.label]) for image in images])
    image_of = np.tile(np.repeat(np.argsort(np.argsort(digests)), samples), points)
    chosen = np.zeros(len(image_of), bool)
    chosen[np.argsort(image_of, kind="stable")[:limit]] = True
    return chosen


OF_A_IMAGE = {
    "image_path": "path", "image_size": "size", "label": "label", "lung_mask_path": "lung_mask",
    "lesion_mask_path": "lesion_mask", "ground_truth_path": "ground_truth",
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
    """PlanError for settings that no image could be generated with, whether swept or from the recipe."""
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
