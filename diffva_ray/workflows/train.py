"""``diffva train``: start a training, resume it, or find that it is complete."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from diffva_ray.config.recipe import Recipe, RecipeError, fingerprint, fingerprint_difference
from diffva_ray.config.stages import ControlNetStageConfig
from diffva_ray.data.bit_depth import checked_bit_depth
from diffva_ray.data.conditions import own_columns
from diffva_ray.data.dataset import Dataset
from diffva_ray.data.datasets import open_dataset
from diffva_ray.generate.run import FingerprintDiffers
from diffva_ray.model.card import PROGRESS, TRAINING, UnusableModel, read_card
from diffva_ray.model.hub_card import write_hub_card
from diffva_ray.progress import LOG
from diffva_ray.provenance import provenance
from diffva_ray.schema import digest
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import Store, absolute, is_local
from diffva_ray.train.classes import described, fitted
from diffva_ray.workflows.execution import Executor

INTERVALS = {f"train.{name}" for name in ("checkpoint_every", "checkpoint_minutes", "checkpoints_to_keep", "log_every")}


def train_model(
    recipe: Recipe,
    data: str,
    out: str,
    workers: int | tuple[int, int] = 1,
    gpus_per_worker: float | None = None,
    executor: Executor = "ray",
) -> bool:
    """Train the recipe's stages and export the model to ``out``; resumes a training that was interrupted.

    Args:
        recipe: Recipe whose ``train`` section holds the stages.
        data: Data set (folder, manifest or object store address) with the training images.
        out: Model folder.
        workers: Number of Ray Train workers, or (minimum, maximum).
        gpus_per_worker: GPUs of each worker; by default 1 if the cluster has GPUs, otherwise 0.
        executor: ``ray``, or ``inline`` for a plain loop in this process, which ignores ``workers``.

    Returns:
        Whether training was needed: False if the model is complete already.

    Raises:
        FingerprintDiffers: ``out`` holds a model of another training.
        UnusableData: The data set cannot be read or lacks a class of the recipe.
        UnusableModel: The base model or a checkpoint cannot be used.
        RecipeError: The recipe asks for something that cannot be built.
    """
    # Compare with the training that was started at ``out``, if any. Its fingerprint stays valid, also if later
    # versions of diffva-ray add settings.
    store = open_store(out)
    recipe, keys, dataset = training_keys(recipe, data)
    if is_trained(store, keys):
        LOG.info("%s is trained already; nothing to do", out)
        return False

    # Record what is trained, before the first step.
    if note := checked_bit_depth(dataset):
        LOG.info("data: %s", note)
    claimed = store.put_if_absent(TRAINING, json.dumps(keys).encode())
    started_keys = _started_keys(store, keys)  # of another process, if that was first
    training_fingerprint = fingerprint(started_keys)
    workers_text = str(workers) if isinstance(workers, int) else f"{workers[0]} to {workers[1]}"
    LOG.info("training recipe %s on %d images, %s workers", recipe.name, len(dataset.images), workers_text)
    for line in described(recipe, dataset):
        LOG.info("%s", line)
    about = {**provenance(), "data": absolute(data), "data_kind": dataset.kind}

    # Train. If it fails before the first step, a corrected command may follow.
    try:
        _train(recipe, data, out, training_fingerprint, about, workers, gpus_per_worker, executor)
    except BaseException:
        if claimed and not store.exists(PROGRESS):
            store.delete(TRAINING)
        raise
    write_hub_card(store)
    return True


def is_trained(store: Store, keys: dict[str, Any]) -> bool:
    """Whether the model of a training with these ``keys`` is complete. Raises FingerprintDiffers when ``store`` holds
    the model or the beginning of another training."""
    training_fingerprint = fingerprint(_started_keys(store, keys))
    card = read_card(store)  # marks a complete model
    if card is not None and card.get("training_fingerprint") != training_fingerprint:
        existing = {"model": card.get("training_fingerprint", "a foreign model")}
        raise FingerprintDiffers(store.uri, ["model"], existing, {"model": training_fingerprint})
    return card is not None


def _started_keys(store: Store, keys: dict[str, Any]) -> dict[str, Any]:
    """The keys of the training that was started at ``store``; ``keys`` if there is none. Raises FingerprintDiffers if
    they differ, UnusableModel if their file is damaged."""
    try:
        started = json.loads(store.read(TRAINING))
    except (FileNotFoundError, NotADirectoryError):
        return keys
    except (ValueError, RecursionError):
        started = None
    if not isinstance(started, dict):
        raise UnusableModel(
            f"{store.uri}/{TRAINING} is damaged; delete it if this is the training that was started there"
        )
    old, new = (_without_intervals(_flat(each)) for each in (_with_defaults(started), keys))
    if changed := fingerprint_difference(old, new):
        raise FingerprintDiffers(store.uri, changed, _short(old), _short(new))
    return started


def check_training(
    recipe: Recipe, data: str, out: str, workers: int | tuple[int, int] = 1
) -> tuple[Recipe, list[str], int, list[str]]:
    """Raise what ``train_model`` would raise before its first step. Builds the networks, writes nothing. Returns the
    recipe with the classes of the data, its description, the number of images, and the GPU memory that it needs."""
    from diffva_ray.train.loop import prepare
    from diffva_ray.train.memory import memory_lines

    store = open_store(out)
    recipe, keys, dataset = training_keys(recipe, data)
    memory: list[str] = []
    if not is_trained(store, keys):
        least, most = (workers, workers) if isinstance(workers, int) else workers
        bundle, _, stages = prepare(recipe, data, store, most)
        memory = memory_lines(bundle, stages, recipe.train, least)
    return recipe, described(recipe, dataset), len(dataset.images), memory


def _train(
    recipe: Recipe,
    data: str,
    out: str,
    training_fingerprint: str,
    about: dict[str, Any],
    workers: int | tuple[int, int],
    gpus_per_worker: float | None,
    executor: Executor,
) -> None:
    """Train: in this process, or on Ray Train workers."""
    if executor == "inline":
        return _train_inline(recipe, data, out, training_fingerprint, about)
    from diffva_ray.distributed import session

    with session.connect() as private:
        from diffva_ray.distributed.train import fit

        sections = recipe.model_dump(mode="json")
        images, model = absolute(data), absolute(out)
        fit(sections, images, model, training_fingerprint, about, workers, gpus_per_worker, private)


def _train_inline(recipe: Recipe, data: str, out: str, training_fingerprint: str, about: dict[str, Any]) -> None:
    """Train in this process, from the latest checkpoint in ``.train`` of the model folder if there is one."""
    from diffva_ray.train.checkpoint import Checkpoints
    from diffva_ray.train.loop import train
    from diffva_ray.train.progress import followed
    from diffva_ray.train.validation import validation_of

    if not is_local(out):
        raise UnusableModel(f"--out {out}: training with --executor inline needs a local folder for its checkpoints")
    store = open_store(out)
    checkpoints = Checkpoints(Path(store.uri) / ".train", recipe.train.checkpoints_to_keep)
    with followed(store):
        train(
            recipe,
            data,
            out,
            fingerprint=training_fingerprint,
            provenance=about,
            report=checkpoints,
            resume=checkpoints.latest(),
            threads=cores(),
            validate=validation_of(recipe),
            scratch=checkpoints.folder,
        )


def training_keys(recipe: Recipe, data: str) -> tuple[Recipe, dict[str, Any], Dataset]:
    """Return the recipe with the classes of the data set, the settings and the digest of the images that identify a
    training, and the data set. Raises UnusableData if the data set lacks a class that the recipe names, RecipeError if
    the recipe trains nothing."""
    if not recipe.train.stages:
        raise RecipeError(f"--recipe {recipe.name}: has no stages to train; it is for diffva generate")
    dataset = open_dataset(data, recipe.data)
    recipe = fitted(recipe, dataset)
    images = sorted((image.path, image.label, image.size, *filter(None, [image.caption])) for image in dataset.images)
    told = []  # what captions are made of, besides the pixels, and the condition images
    if recipe.data.captions is not None:
        columns = sorted((image.path, image.label, sorted(image.columns.items())) for image in dataset.images)
        told = [columns, sorted((path, [repr(shape) for shape in shapes]) for path, shapes in dataset.shapes.items())]
    stages = (stage for stage in recipe.train.stages if isinstance(stage, ControlNetStageConfig))
    for column in sorted({name for stage in stages for name in own_columns(stage.conditions)}):
        told.append(sorted((image.path, image.label, image.columns.get(column, "")) for image in dataset.images))
    keys = recipe.model_dump(mode="json", include={"seed", "data", "model", "train"})
    return recipe, {**keys, "images": digest([images, *told] if told else images)}, dataset


def cores() -> int:
    """Return the number of cores that this process may use; a container or ``taskset`` can limit it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _with_defaults(keys: dict[str, Any]) -> dict[str, Any]:
    """Add the defaults of settings that are newer than an earlier training's keys. Returns the keys unchanged if one of
    their settings no longer exists."""
    try:
        recipe = Recipe.model_validate({"name": "", **{key: keys[key] for key in keys if key != "images"}})
    except ValidationError:
        return keys
    return {**recipe.model_dump(mode="json", include={*keys}), "images": keys.get("images")}


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Flatten sections and lists to one mapping with dotted keys, as in ``--set``: train.stages.1.steps."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
    inner = [_flat(below, f"{name}.{key}" if name else str(key)) for key, below in items]
    return {key: leaf for part in inner for key, leaf in part.items()} if inner else {name: value}


def _without_intervals(keys: dict[str, Any]) -> dict[str, Any]:
    """Leave out the settings that do not change what is trained: they may be others when a training goes on."""
    return {key: value for key, value in keys.items() if key not in INTERVALS}


def _short(keys: dict[str, Any]) -> dict[str, Any]:
    """Replace long values by a digest, for messages."""
    return {key: value if len(str(value)) < 60 else f"digest {digest(value)[:8]}" for key, value in keys.items()}
