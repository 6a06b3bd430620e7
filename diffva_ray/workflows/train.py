"""``diffva train``: a training is begun, continued, or found done."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from diffva_ray.config.recipe import (
    Recipe,
    fingerprint,
    fingerprint_difference,
)
from diffva_ray.data.bit_depth import bit_depth_note
from diffva_ray.data.dataset import Dataset, UnusableData
from diffva_ray.data.datasets import open_dataset
from diffva_ray.generate.run import (
    FingerprintDiffers,
)
from diffva_ray.model.card import TRAINING, UnusableModel, read_card
from diffva_ray.progress import LOG
from diffva_ray.provenance import provenance
from diffva_ray.schema import digest
from diffva_ray.storage.store import absolute, is_local, open_store
from diffva_ray.workflows.execution import Executor


def training_keys(recipe: Recipe, data: str) -> tuple[dict[str, Any], Dataset]:
    """What makes two trainings the same one, and the images."""
    dataset = open_dataset(data, recipe.data)
    wanted = {label for stage in recipe.train.stages for label in stage.classes}
    absent = sorted(wanted - set(dataset.classes))
    if absent:
        raise UnusableData(
            f"--data {data}: no image of class {absent[0]!r}, which the recipe trains on; there are "
            f"{', '.join(dataset.classes)}"
        )
    images = sorted((image.path, image.label, image.size, *filter(None, [image.caption])) for image in dataset.images)
    keys = recipe.model_dump(mode="json", include={"seed", "data", "model", "train"})
    return {**keys, "images": digest(images)}, dataset


def train_model(
    recipe: Recipe,
    data: str,
    out: str,
    workers: int | tuple[int, int] = 1,
    gpus_per_worker: float | None = None,
    executor: Executor = "ray",
) -> bool:
    """Train (or go on training) and export to ``out``; False when that model is there already.

    Raises FingerprintDiffers when ``out`` holds a model of another training.
    """
    store = open_store(out)
    keys, dataset = training_keys(recipe, data)
    try:
        before = json.loads(store.read(TRAINING))
    except (FileNotFoundError, NotADirectoryError):
        before = keys
    old, new = _flat(_with_defaults(before)), _flat(keys)
    if changed := fingerprint_difference(old, new):
        raise FingerprintDiffers(out, changed, _short(old), _short(new))
    mark = fingerprint(before)  # the one it was begun with: its card may carry it
    card = read_card(store)
    if card is not None:
        if card.get("training_fingerprint") != mark:
            raise FingerprintDiffers(
                out, ["model"], {"model": card.get("training_fingerprint", "a foreign model")}, {"model": mark}
            )
        LOG.info("%s is trained already; nothing to do", out)
        return False
    if note := bit_depth_note(dataset):
        LOG.info("data: %s", note)
    store.put(TRAINING, json.dumps(before).encode())
    LOG.info("training recipe %s on %d images, %s workers", recipe.name, len(dataset.images), _spelt(workers))
    about = {**provenance(), "data": absolute(data), "data_kind": dataset.kind}
    if executor == "inline":
        from diffva_ray.train.checkpoint import Checkpoints
        from diffva_ray.train.loop import train
        from diffva_ray.train.progress import followed
        from diffva_ray.train.validation import validation_of

        folder = _training_folder(out)
        keep = Checkpoints(folder, recipe.train.checkpoints_to_keep)
        with followed(store):
            train(
                recipe,
                data,
                out,
                fingerprint=mark,
                provenance=about,
                report=keep,
                resume=keep.latest(),
                threads=cores(),
                validate=validation_of(recipe),
            )
        return True
    from diffva_ray.distributed import session

    with session.connect() as private:
        from diffva_ray.distributed.train import fit

        fit(
            recipe.model_dump(mode="json"), absolute(data), absolute(out), mark, about, workers, gpus_per_worker,
            private,
        )  # fmt: skip
    return True


def cores() -> int:
    """Cores that this process may use, which a container or ``taskset`` can make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _spelt(workers: int | tuple[int, int]) -> str:
    return str(workers) if isinstance(workers, int) else f"{workers[0]} to {workers[1]}"


def _training_folder(out: str) -> Path:
    """Where training without Ray keeps its checkpoints: a local folder. Raises UnusableModel for a store."""
    if not is_local(out):
        raise UnusableModel(f"--out {out}: training with --executor inline keeps its checkpoints on a local disk")
    return Path(open_store(out).uri) / ".train"


def _with_defaults(keys: dict[str, Any]) -> dict[str, Any]:
    """Keys of an earlier training, with the defaults of settings that came after it; as they are where a setting has
    gone since."""
    try:
        recipe = Recipe.model_validate({"name": "", **{key: keys[key] for key in keys if key != "images"}})
    except ValidationError:
        return keys
    return {**recipe.model_dump(mode="json", include={*keys}), "images": keys.get("images")}


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Sections and lists as one mapping from dotted keys, as ``--set`` writes them: train.stages.1.steps."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
    inner = [_flat(below, f"{name}.{key}" if name else str(key)) for key, below in items]
    return {key: leaf for part in inner for key, leaf in part.items()} if inner else {name: value}


def _short(keys: dict[str, Any]) -> dict[str, Any]:
    return {key: value if len(str(value)) < 60 else f"digest {digest(value)[:8]}" for key, value in keys.items()}
