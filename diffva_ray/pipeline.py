"""The stages of a job, as the command line and a notebook call them: train, generate, reduce.

Each continues what is there, does nothing when there is nothing to do, and raises one exception per exit code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import ValidationError

from diffva_ray.config import GUESS, SOURCE, Recipe, fingerprint, fingerprint_difference, load_recipe, make_recipe
from diffva_ray.data.bit_depth import bit_depth_note
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.films import Dataset, UnusableData
from diffva_ray.evaluate.options import Options
from diffva_ray.evaluate.reduction import Reduced, reduce_run
from diffva_ray.generate.budget import check_first_shards
from diffva_ray.generate.data_identity import check_same, content_sample, moved
from diffva_ray.generate.keys import keys_now, pixel_keys
from diffva_ray.generate.ledger import start_retry
from diffva_ray.generate.plan import PromptTooLong, Request, make_plan
from diffva_ray.generate.run import (
    PLAN_FILE,
    SUCCESS,
    FingerprintDiffers,
    Run,
    continue_run,
    find_run,
    remember_data,
    start_run,
)
from diffva_ray.methods import METHODS
from diffva_ray.model.card import TRAINING, UnusableModel, folder_digest, judge_card, prompt_limit, read_card
from diffva_ray.observe import LOG, Progress
from diffva_ray.provenance import provenance, torch_version
from diffva_ray.schema import digest
from diffva_ray.storage import Store, absolute, is_local, open_store

Executor = Literal["ray", "inline"]  # on a Ray, or a plain loop in this process


def model_recipe(model: str, recipe: str | None, overrides: tuple[str, ...]) -> Recipe:
    """The recipe to work with a model: the one named, or the one the model was trained with."""
    if recipe is not None:
        return load_recipe(recipe, overrides)
    card = read_card(open_store(model))
    if card is None:
        raise UnusableModel(
            f"--model {model}: no diffva.json there; train a model first, or name a recipe with --recipe"
        )
    return make_recipe(card["recipe"], overrides)


def training_keys(recipe: Recipe, data: str) -> tuple[dict[str, Any], Dataset]:
    """What makes two trainings the same one, and the films."""
    dataset = open_dataset(data, recipe.data)
    wanted = {label for stage in recipe.train.stages for label in stage.classes}
    absent = sorted(wanted - set(dataset.classes))
    if absent:
        raise UnusableData(
            f"--data {data}: no film of class {absent[0]!r}, which the recipe trains on; there are "
            f"{', '.join(dataset.classes)}"
        )
    films = sorted((film.path, film.label, film.size, *filter(None, [film.caption])) for film in dataset.films)
    keys = recipe.model_dump(mode="json", include={"seed", "data", "model", "train"})
    return {**keys, "films": digest(films)}, dataset


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
    LOG.info("training recipe %s on %d films, %s workers", recipe.name, len(dataset.films), _spelt(workers))
    about = {**provenance(), "data": absolute(data), "data_kind": dataset.kind}
    if executor == "inline":
        from diffva_ray.train.checkpoint import Checkpoints
        from diffva_ray.train.loop import train
        from diffva_ray.train.progress import followed
        from diffva_ray.validation import validation_of

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
    from diffva_ray import ray_cluster

    with ray_cluster.session() as private:
        from diffva_ray.ray_train import fit

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
        recipe = Recipe.model_validate({"name": "", **{key: keys[key] for key in keys if key != "films"}})
    except ValidationError:
        return keys
    return {**recipe.model_dump(mode="json", include={*keys}), "films": keys.get("films")}


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Sections and lists as one mapping from dotted keys, as ``--set`` writes them: train.stages.1.steps."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
    inner = [_flat(below, f"{name}.{key}" if name else str(key)) for key, below in items]
    return {key: leaf for part in inner for key, leaf in part.items()} if inner else {name: value}


def _short(keys: dict[str, Any]) -> dict[str, Any]:
    return {key: value if len(str(value)) < 60 else f"digest {digest(value)[:8]}" for key, value in keys.items()}


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a run is carried out; none of it changes a pixel."""

    executor: Executor = "ray"
    actors: int | None = None
    gpus_per_actor: float | None = None
    allow_environment_change: bool = False


def plan_run(
    recipe: Recipe, data: str, model: str, out: str, request: Request, execution: Execution, device: str
) -> Run:
    """The run at ``out``: planned now, or found there and continued. Raises FingerprintDiffers, PlanError."""
    store = open_store(out)
    keys = pixel_keys(recipe, request, model_digest_of(model), torch_version(), device)
    run = find_run(store)
    if run is not None:
        run = continue_run(run, keys, execution.allow_environment_change)
    if run is None or not store.exists(PLAN_FILE):
        run = _planned(recipe, data, model, store, request, run.about["keys"] if run else keys)
    return moved(run, data)


def _planned(recipe: Recipe, data: str, model: str, store: Store, request: Request, keys: dict[str, Any]) -> Run:
    """The run at ``store``, planned now, or just now by another process."""
    dataset = films_to_heal(recipe, data, request)
    for note in (*dataset.notes, *filter(None, [bit_depth_note(dataset)])):
        LOG.info("data: %s", note)
    about = {
        "recipe": recipe.model_dump(mode="json"),
        "data": absolute(data),
        "data_root": dataset.store.uri,
        "data_kind": dataset.kind,
        "data_sample": content_sample(dataset),
        "model": absolute(model),
        "judge": judge_card(open_store(model)),
        **provenance(),
    }
    plan = make_plan(dataset, recipe, request)
    check_plan(recipe, model, plan)
    return start_run(store, plan, keys, about)


def model_digest_of(model: str) -> str:
    card = read_card(open_store(model))
    return str(card["digest"]) if card else folder_digest(open_store(model).local_folder())


def check_plan(recipe: Recipe, model: str, plan: pa.Table) -> None:
    """Whether the model can do what is planned. Raises UnusableModel, PromptTooLong."""
    for method in plan["method"].unique().to_pylist():
        check_needs(model, method)
    check_prompts(model, plan["prompt"].unique().to_pylist())
    check_prompts(model, other_prompts(recipe), "generate.source_prompt or negative_prompt")


def other_prompts(recipe: Recipe) -> list[str]:
    """The prompts that a method reads beside the record's own, where they are words."""
    config = recipe.generate
    return [prompt for prompt in (config.source_prompt, config.negative_prompt) if prompt not in ("", GUESS, SOURCE)]


def check_needs(model: str, method: str) -> None:
    """Raises UnusableModel when the method needs a network that the model folder has not."""
    needed = METHODS[method].needs
    if needed and not open_store(model).exists(f"{needed}/config.json"):
        kind = needed.replace("_", "-")
        raise UnusableModel(
            f"--model {model}: method {method} needs a {kind}, which this model has not; train one with a stage that "
            f"`trains: {kind}`"
        )


def check_prompts(model: str, prompts: Sequence[str], option: str = "--prompt") -> None:
    """Raises PromptTooLong for a prompt that the model would cut."""
    limit, long = prompt_limit(open_store(model), prompts)
    if long:
        shown = long[0] if len(long[0]) <= 60 else long[0][:59] + "…"
        raise PromptTooLong(f"{option} {shown!r}: more than the {limit} tokens this model reads; make it shorter")


def films_to_heal(recipe: Recipe, data: str, request: Request) -> Dataset:
    """The films of the classes asked for; by default of all but the healthy one."""
    if request.classes is not None:
        return open_dataset(data, recipe.data, request.classes)
    dataset = open_dataset(data, recipe.data)
    healthy = recipe.data.healthy_class
    films = [film for film in dataset.films if film.label != healthy]
    if not films:
        raise UnusableData(f"--data {data}: holds only the healthy class {healthy}; name what to heal with --classes")
    return replace(dataset, films=films)


def generate_run(
    recipe: Recipe, data: str, model: str, out: str, request: Request, execution: Execution = Execution()
) -> dict[str, int]:
    """Plan or continue the run at ``out`` and carry out all pending shards; returns counts of the work done now."""
    return _with_device(
        execution,
        lambda device: _carry_out(plan_run(recipe, data, model, out, request, execution, device), model, execution),
    )


def _with_device(execution: Execution, work: Callable[[str], dict[str, int]]) -> dict[str, int]:
    """``work(device)`` with the kind of device that the records will be made on; on Ray, inside a session."""
    if execution.executor == "inline":
        from diffva_ray.counterfactual.engine import device_kind

        return work(device_kind())
    from diffva_ray import ray_cluster

    with ray_cluster.session() as private:
        if private and execution.gpus_per_actor:
            ray_cluster.check_room(f"--gpus-per-actor {execution.gpus_per_actor:g}", GPU=execution.gpus_per_actor)
        share = execution.gpus_per_actor  # asked for, it is waited for: an autoscaling cluster has no GPU yet
        return work("cuda" if (ray_cluster.gpus() if share is None else share) else "cpu")


def _carry_out(run: Run, model: str, execution: Execution) -> dict[str, int]:
    pending = run.pending()
    total, shards = run.about["records"], run.shards
    if not pending:
        LOG.info("%s: all %d records in %d shards are done; nothing to do", run.store.uri, total, shards)
        return {"shards": 0, "records": 0, "ok": 0}
    sizes = run.shard_sizes()
    done = total - sum(sizes[shard] for shard in pending)
    LOG.info("%s: %d records in %d shards, %d shards pending", run.store.uri, total, shards, len(pending))
    check_same(run, run.data)
    remember_data(run)
    run.store.delete(SUCCESS)  # what is committed from here on is in no table yet
    run.store.sweep()
    progress = Progress("generated", total, "records", done=done)
    counts = {"shards": 0, "records": 0, "ok": 0}

    def on_shard(report: dict[str, Any]) -> None:
        counts["shards"] += 1
        counts["records"] += report["records"]
        counts["ok"] += report["ok"]
        bad = counts["records"] - counts["ok"]
        progress.update(done + counts["records"], f"{bad} quarantined" if bad else "")
        check_first_shards(run, counts)

    if execution.executor == "inline":
        from diffva_ray.generate.shard import Workbench, run_shard

        bench = Workbench.open(run.store.uri, run.about["data_root"], model)
        for shard in pending:
            on_shard(run_shard(bench, shard))
    else:
        from diffva_ray.ray_generate import generate

        generate(
            run.store.uri, run.about["data_root"], absolute(model), pending, on_shard,
            execution.actors, execution.gpus_per_actor,
        )  # fmt: skip
    return counts


def retry_run(
    run: Run, execution: Execution = Execution(), data: str | None = None, model: str | None = None
) -> dict[str, int]:
    """Make the quarantined records again, as an overlay; returns counts of the work done now (none: nothing to retry).

    ``data`` and ``model`` are where they are now, if they have moved. Raises PlanError, FingerprintDiffers.
    """
    if data is not None or model is not None:
        run = moved(run, data) if data is not None else run
        run = replace(run, about={**run.about, "model": absolute(model or run.about["model"])})

    def carry_out(device: str) -> dict[str, int]:
        now = keys_now(run, torch_version(), device)
        permitted = continue_run(run, now, execution.allow_environment_change)
        overlay = start_retry(permitted)
        if overlay is None:
            return {"shards": 0, "records": 0, "ok": 0}
        run.store.delete(SUCCESS)  # its tables are of the records as they were
        remember_data(run)
        there = replace(overlay, about={**overlay.about, **{key: run.about[key] for key in ("data", "data_root")}})
        return _carry_out(there, run.about["model"], execution)

    return _with_device(execution, carry_out)


def reduce(run: Run, options: Options, executor: Executor = "ray", data: str | None = None) -> Reduced:
    """Verify the run and write its tables; scoring is spread over the cluster unless ``executor`` is ``inline``.

    ``data``: where the data set is now, if it has moved; the run remembers it. Raises Incomplete, StoreError where the
    images are not there, UnusableData where they are others.
    """
    run = run if data is None else moved(run, data)
    data = run.about["data"]
    if executor == "inline" or run.shards == 1:
        return reduce_run(run, data, options)
    from diffva_ray import ray_cluster

    with ray_cluster.session():
        from diffva_ray.ray_reduce import Cluster

        return reduce_run(run, data, options, Cluster())
