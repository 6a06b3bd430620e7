"""Makes the plan: every record with its shard and its seed, before any GPU work starts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import ValidationError

from diffva_ray.config.methods import METHODS
from diffva_ray.config.prompts import check_composed
from diffva_ray.config.recipe import GUESS, SOURCE, GenerateConfig, Recipe, first_error
from diffva_ray.config.sampling import SWEEPABLE, SamplingSettings, parse_value
from diffva_ray.data.columns import REPORT
from diffva_ray.data.dataset import Dataset, LabelledImage
from diffva_ray.generate.run import PlanError
from diffva_ray.schema import PLAN, digest, record_id, record_seed

OF_A_SHARD = tuple(SamplingSettings.model_fields)  # columns that are equal within a shard
OF_AN_IMAGE = {  # attribute of LabelledImage by column of PLAN
    "image_path": "path", "image_size": "size", "label": "label", "lung_mask_path": "lung_mask",
    "lesion_mask_path": "lesion_mask", "ground_truth_path": "ground_truth", "patient": "patient",
}  # fmt: skip


class PromptTooLong(PlanError):
    """A prompt has more tokens than the model reads."""


@dataclass(frozen=True)
class Request:
    """What to generate: which images, with which prompt, over which sweep."""

    classes: tuple[str, ...] | None = None  # of the images; None: all classes except the healthy one
    prompt: str | None = None  # None: the recipe's healthy prompt
    limit: int | None = None  # number of records at most; None: all
    sweep: tuple[tuple[str, tuple[Any, ...]], ...] = ()  # (key of SWEEPABLE, values), as ``parse_sweep`` returns it


def parse_sweep(texts: Iterable[str]) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    """Parse ``--sweep`` options: ``strength=0.3,0.55`` -> (("strength", (0.3, 0.55)),). Raises PlanError."""
    sweep: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or key not in SWEEPABLE:
            raise PlanError(f"--sweep {text}: write key=value,value with key one of {', '.join(SWEEPABLE)}")
        if key in sweep:
            raise PlanError(f"--sweep {text}: {key} is given twice; write all its values in one --sweep {key}=…,…")
        try:
            sweep[key] = tuple(parse_value(key, value) for value in values.split(","))
        except ValueError:
            raise PlanError(f"--sweep {text}: {key} takes numbers") from None
        if len(set(sweep[key])) < len(sweep[key]):
            raise PlanError(f"--sweep {text}: a value is given twice")
    return tuple(sweep.items())


def make_plan(dataset: Dataset, recipe: Recipe, request: Request) -> pa.Table:
    """Plan one record per image, sweep point and sample, in shards with equal sampling settings.

    Rows are in the order of settings and record id; sorting by id spreads classes and storage keys evenly over shards.

    Args:
        dataset: The images.
        recipe: Sampling settings, samples per image, shard size and seed.
        request: Prompt, limit and sweep; its ``classes`` have been applied when ``dataset`` was opened.

    Returns:
        A table with the columns of PLAN, then further ones of the data set but ``report``; strings are
        dictionary-encoded, so that ten million rows fit in memory.

    Raises:
        PlanError: No image is left, an image is listed twice under one label, or the settings cannot be used.
    """
    config, images = recipe.generate, dataset.images
    points = _points(recipe, request)
    if not points or not images:
        raise PlanError("no image is left to plan")
    # record ids [points x images x samples], then the order by id
    samples, total = config.samples, len(points) * len(images) * config.samples
    names = (
        record_id(image.path, image.label, point.prompt, point.settings.method, {**point.id_settings, "draw": sample})
        for point, image, sample in itertools.product(points, images, range(samples))
    )
    ids = np.fromiter(names, "S20", total)
    order = np.argsort(ids, kind="stable")
    if (ids[order[1:]] == ids[order[:-1]]).any():
        raise PlanError("the data set lists an image twice under one label")
    if request.limit is not None:
        order = order[_limited(images, len(points), samples, request.limit)[order]]

    # group by sampling settings and cut into shards
    keys = [tuple(point.settings.model_dump().values()) for point in points]
    rank = np.array([sorted(set(keys)).index(key) for key in keys])[order // (len(images) * samples)]
    order = order[np.argsort(rank, kind="stable")]  # records with equal settings stay in the order of ids
    shard, position = cut(np.sort(rank), config.shard_size)
    point_of, image_of, sample_of = np.unravel_index(order, (len(points), len(images), samples))

    # the columns
    seeds = np.fromiter(
        (record_seed(recipe.seed, image.path, sample) for image, sample in itertools.product(images, range(samples))),
        np.int64, len(images) * samples,
    )  # fmt: skip
    columns = {
        "record_id": pa.array(ids[order]).cast(pa.string()),
        "shard": pa.array(shard, pa.int32()),
        "position": pa.array(position, pa.int32()),
        "seed": pa.array(seeds[image_of * samples + sample_of]),
        "sample": pa.array(sample_of, pa.int32()),
    }
    for name in PLAN.names:
        if name in OF_AN_IMAGE:
            values = [getattr(image, OF_AN_IMAGE[name]) for image in images]
            columns[name] = _spread(values, image_of, PLAN.field(name).type)
        elif name in SWEEPABLE:
            columns[name] = _spread([point.columns[name] for point in points], point_of, PLAN.field(name).type)
        elif name not in columns:
            columns[name] = _spread([image.columns.get(name, "") for image in images], image_of, pa.string())
    # A report is for captions: long, and not to be copied into every run.
    further = sorted({name for image in images for name in image.columns} - {*PLAN.names, REPORT})
    for name in further:
        columns[name] = _spread([image.columns.get(name, "") for image in images], image_of, pa.string())
    return pa.table({name: columns[name] for name in (*PLAN.names, *further)})


def _limited(images: Sequence[LabelledImage], points: int, samples: int, limit: int) -> NDArray[np.bool_]:
    """Mask over the records [points x images x samples] that keeps ``limit`` of them.

    Records are taken image by image, in the order of the digest of path and label. So runs with other settings take
    the same images and can be compared, and a sweep has all its points for each image."""
    digests = np.array([digest([image.path, image.label]) for image in images])
    image_of = np.tile(np.repeat(np.argsort(np.argsort(digests)), samples), points)
    chosen = np.zeros(len(image_of), bool)
    chosen[np.argsort(image_of, kind="stable")[:limit]] = True
    return chosen


def _spread(values: list[Any], of: NDArray[np.int64], kind: pa.DataType) -> pa.Array:
    """``values[of]`` as a column; strings stay dictionary-encoded."""
    column = pa.array(values, kind)
    return (column.dictionary_encode() if pa.types.is_string(column.type) else column).take(pa.array(of))


@dataclass(frozen=True)
class _Point:
    """One point of a sweep."""

    prompt: str
    settings: SamplingSettings

    @property
    def columns(self) -> dict[str, Any]:
        """The values by the keys of SWEEPABLE."""
        return {**self.settings.model_dump(), "prompt": self.prompt}

    @property
    def id_settings(self) -> dict[str, Any]:
        """The settings that are part of a record's id, besides the method."""
        return self.settings.model_dump(exclude={"method"})


def _points(recipe: Recipe, request: Request) -> list[_Point]:
    """All points of the sweep. Raises PlanError."""
    points = []
    for values in itertools.product(*(values for _, values in request.sweep)):
        swept = dict(zip((key for key, _ in request.sweep), values, strict=True))
        prompt = swept.pop("prompt", request.prompt if request.prompt is not None else recipe.data.healthy_prompt)
        check_settings(recipe.generate, swept, prompt)
        points.append(_Point(prompt, recipe.generate.sampling.replace(**swept)))
    return points


def cut(rank: NDArray[np.int64], shard_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Shard number and position in the shard of each record; ``rank`` [n] numbers the records' settings, sorted.

    A shard holds at most ``shard_size`` records with equal settings, because they are generated in one batch."""
    position = (np.arange(len(rank)) - np.searchsorted(rank, rank)) % shard_size
    return np.cumsum(position == 0) - 1, position


def cut_again(plan: pa.Table, shard_size: int) -> pa.Table:
    """Make a new plan of some records of a plan (columns of PLAN), in the order of settings and record id."""
    plan = plan.sort_by([(key, "ascending") for key in (*OF_A_SHARD, "record_id")])
    settings = list(zip(*(plan[key].to_pylist() for key in OF_A_SHARD)))
    rank = np.cumsum([0, *(before != after for before, after in itertools.pairwise(settings))])
    for name, values in zip(("shard", "position"), cut(rank, shard_size)):
        plan = plan.set_column(PLAN.get_field_index(name), PLAN.field(name), pa.array(values, pa.int32()))
    return plan


def check_settings(config: GenerateConfig, settings: dict[str, Any], prompt: str = "") -> None:
    """Raises PlanError for a recipe whose ``settings`` are swept, and for a prompt, when they cannot be used for
    generation."""
    try:
        checked = GenerateConfig.model_validate({**config.model_dump(), **settings})
    except ValidationError as error:
        raise PlanError(first_error(error)) from None
    if int(checked.num_inference_steps * checked.strength) < 1:
        raise PlanError(
            f"strength {checked.strength:g} of {checked.num_inference_steps} steps leaves no step to do; increase "
            "--strength or --steps"
        )
    method = METHODS[checked.method]
    try:
        check_composed(prompt, checked.sampling, checked.acceleration.on)
    except ValueError as error:
        raise PlanError(str(error)) from None
    if checked.acceleration.on and (
        not method.shortcuts or (checked.method == "masked" and checked.masked.source != "difference")
    ):
        raise PlanError(
            f"generate.acceleration: method {checked.method} does not support it; these do: "
            f"{', '.join(name for name, method in METHODS.items() if method.shortcuts)} (by difference)"
        )
    if checked.compile and checked.acceleration.deep_features_every > 1:
        raise PlanError("generate.compile: a compiled UNet cannot reuse deep features; set deep_features_every to 1")
    if not method.reads_prompt and checked.source_prompt == GUESS:
        raise PlanError(
            f"method {checked.method} reads no prompt, so guessing one is useless; give --set generate.source_prompt="
        )
    if checked.method == "text-to-image" and checked.strength < 1:
        raise PlanError(f"method text-to-image starts from noise, so --strength is 1, not {checked.strength:g}")
    if checked.method == "text-to-image" and checked.negative_prompt == SOURCE:
        raise PlanError("method text-to-image reads no image, so generate.negative_prompt cannot be the source prompt")
    if checked.scheduler != (only := method.scheduler or checked.scheduler):
        raise PlanError(
            f"method {checked.method} runs with scheduler {only}, not {checked.scheduler}; give --scheduler {only} or "
            "--method sdedit"
        )
