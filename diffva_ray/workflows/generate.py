"""``diffva generate`` and ``diffva retry``: plan or continue a run, then execute its pending shards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyarrow as pa

from diffva_ray.config.methods import METHODS
from diffva_ray.config.prompts import texts_of
from diffva_ray.config.recipe import GUESS, SOURCE, Recipe, fingerprint_difference
from diffva_ray.data.bit_depth import checked_bit_depth
from diffva_ray.data.captions import trained_texts
from diffva_ray.data.conditions import own_columns
from diffva_ray.data.dataset import Dataset, UnusableData
from diffva_ray.data.datasets import open_dataset
from diffva_ray.generate.committed import start_retry
from diffva_ray.generate.data_identity import check_same, content_sample, moved
from diffva_ray.generate.failure_threshold import check_first_shards
from diffva_ray.generate.keys import keys_now, pixel_keys
from diffva_ray.generate.plan import PromptTooLong, Request, make_plan
from diffva_ray.generate.run import SUCCESS, Run, continue_run, find_run, remember_data, start_run
from diffva_ray.model.card import ModelFolder, UnusableModel, judge_card
from diffva_ray.progress import LOG, Progress
from diffva_ray.provenance import provenance, torch_version
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import Store, absolute
from diffva_ray.workflows.execution import Execution


def generate_run(
    recipe: Recipe, data: str, model: str, out: str, request: Request, execution: Execution = Execution()
) -> dict[str, int]:
    """Plan or continue the run at ``out`` and execute all pending shards.

    Args:
        recipe: Recipe whose ``generate`` section holds the settings.
        data: Data set (folder, manifest or object store address).
        model: Model folder.
        out: Address of the run; a run that exists there is continued.
        request: Which images and prompts, and which sweep of settings.
        execution: How the run is executed.

    Returns:
        Counts of the work that this call did: ``shards``, ``records``, and ``ok`` (records with status ok).

    Raises:
        FingerprintDiffers: ``out`` holds a run with other settings.
        PlanError: The plan is not possible.
        UnusableData: The data set cannot be read or has none of the requested images.
        UnusableModel: The model folder cannot be used, or lacks a network that the method needs.
    """
    folder = ModelFolder(model)
    if (finished := _finished(recipe, data, folder, out, request)) is not None:
        return _execute(finished, model, execution)  # says that there is nothing to do
    with _device(execution) as device:
        run = plan_or_continue(recipe, data, folder, out, request, execution, device)
        return _execute(run, model, execution)


def retry_run(
    run: Run, execution: Execution = Execution(), data: str | None = None, model: str | None = None
) -> dict[str, int]:
    """Generate the quarantined records again, into an overlay of the run.

    Args:
        run: The run.
        execution: How the overlay is executed.
        data: Address of the data set, if it has moved.
        model: Address of the model folder, if it has moved.

    Returns:
        Counts as of ``generate_run``; zeros if no record is quarantined.

    Raises:
        PlanError: The run cannot be retried.
        FingerprintDiffers: The environment or the model differs from the run's.
    """
    # Apply new addresses of data and model.
    if data is not None or model is not None:
        run = moved(run, data) if data is not None else run
        run = replace(run, about={**run.about, "model": absolute(model or run.about["model"])})

    with _device(execution) as device:
        # Plan the overlay: it holds the quarantined records alone.
        keys = keys_now(run, torch_version(), device)
        overlay = start_retry(continue_run(run, keys, execution.allow_environment_change))
        if overlay is None:
            return {"shards": 0, "records": 0, "ok": 0}

        # Execute it; tables that exist describe the old records.
        run.store.delete(SUCCESS)
        remember_data(run)
        addresses = {key: run.about[key] for key in ("data", "data_root")}
        return _execute(replace(overlay, about={**overlay.about, **addresses}), run.about["model"], execution)


@contextmanager
def _device(execution: Execution) -> Iterator[str]:
    """Connect to Ray unless the executor is ``inline``; yields the kind of device, cuda or cpu, that generates."""
    if execution.executor == "inline":
        from diffva_ray.counterfactual.engine import device_kind

        yield device_kind()
        return
    from diffva_ray.distributed import session

    with session.connect() as private:
        from diffva_ray.distributed import accelerators  # imports Ray, which reads the environment that connect sets

        gpus = execution.gpus_per_actor
        if private and gpus:
            session.check_resources(f"--gpus-per-actor {gpus:g}", GPU=gpus)
        if private and execution.accelerator_type:
            accelerators.check_type(execution.accelerator_type)
        # Requested GPUs are waited for: an autoscaling cluster may have none yet.
        yield "cuda" if (session.gpus() if gpus is None else gpus) else "cpu"


def _finished(recipe: Recipe, data: str, model: ModelFolder, out: str, request: Request) -> Run | None:
    """The run at ``out`` if it is this one, of the same data set, and has no pending shard, which takes neither Ray nor
    a device to find out."""
    run = find_run(open_store(out))
    if run is None or absolute(data) != run.about["data"]:
        return None
    keys = pixel_keys(recipe, request, model.digest, torch_version(), run.keys["device"])
    if fingerprint_difference(run.keys, keys) or not run.has_plan() or run.pending():  # the store is listed last
        return None
    return run


def plan_or_continue(
    recipe: Recipe, data: str, model: ModelFolder, out: str, request: Request, execution: Execution, device: str
) -> Run:
    """Return the run at ``out``: planned now, or an existing one whose fingerprint agrees."""
    store = open_store(out)
    run = find_run(store)
    planned_on = run.keys["device"] if run is not None else device
    keys = pixel_keys(recipe, request, model.digest, torch_version(), device, planned_on)
    if run is not None:
        run = continue_run(run, keys, execution.allow_environment_change)
    if run is None or not run.has_plan():
        run = _plan(recipe, data, model, store, request, run.about["keys"] if run else keys)
    return moved(run, data)


def _plan(recipe: Recipe, data: str, model: ModelFolder, store: Store, request: Request, keys: dict[str, Any]) -> Run:
    """Plan a run and write it to ``store``; returns another process's run if that one was first."""
    # Choose the images.
    dataset = requested_images(recipe, data, request)
    for note in (*dataset.notes, *filter(None, [checked_bit_depth(dataset), _untrained_note(dataset, recipe)])):
        LOG.info("data: %s", note)

    # Describe where everything comes from.
    about = {
        "recipe": recipe.model_dump(mode="json"),
        "data": absolute(data),
        "data_root": dataset.store.uri,
        "data_kind": dataset.kind,
        "data_recognised_by": dataset.why,
        "data_left_out": dataset.left_out,
        "outlined": len(dataset.shapes),
        "data_sample": content_sample(dataset),
        "model": absolute(model.uri),
        "judge": judge_card(model.store),
        **provenance(),
    }

    # Plan all records, and write the plan if the model can carry it out.
    plan = make_plan(dataset, recipe, request)
    check_plan(recipe, model, plan)
    return start_run(store, plan, keys, about)


def _execute(run: Run, model: str, execution: Execution) -> dict[str, int]:
    """Execute the pending shards of a planned run; returns counts of the work done."""
    # Find out what is left to do.
    pending = run.pending()
    total, shards = run.about["records"], run.shards
    if not pending:
        LOG.info("%s: all %d records in %d shards are done; nothing to do", run.store.uri, total, shards)
        return {"shards": 0, "records": 0, "ok": 0}
    sizes = run.shard_sizes()
    done = total - sum(sizes[shard] for shard in pending)
    LOG.info("%s: %d records in %d shards, %d shards pending", run.store.uri, total, shards, len(pending))

    # Check that the images are those of the plan, and prepare the run folder.
    check_same(run, run.data)
    remember_data(run)
    run.store.delete(SUCCESS)  # existing tables will not contain the records committed from now on
    run.store.sweep()
    if run.keys["compile"]:
        LOG.info("each machine compiles the networks first, which takes minutes (generate.compile=false: it does not)")

    # Count and check each shard as it is committed.
    progress = Progress("generated", total, "records", done=done)
    counts = {"shards": 0, "records": 0, "ok": 0}

    def on_shard(report: dict[str, Any]) -> None:
        counts["shards"] += 1
        counts["records"] += report["records"]
        counts["ok"] += report["ok"]
        bad = counts["records"] - counts["ok"]
        progress.update(done + counts["records"], f"{bad} quarantined" if bad else "")
        check_first_shards(run, counts)

    # Generate: in a plain loop, or on a pool of actors.
    images = run.about["data_root"]
    if execution.executor == "inline":
        from diffva_ray.generate.shard import run_shard
        from diffva_ray.generate.worker import WorkerContext

        allowed = execution.allow_environment_change
        context = WorkerContext.open(run.store.uri, images, model, allow_environment_change=allowed)
        for shard in pending:
            on_shard(run_shard(context, shard))
    else:
        from diffva_ray.distributed.generate import generate

        allowed = execution.allow_environment_change
        generate(run.store.uri, images, absolute(model), pending, on_shard, execution.actors, execution.gpus_per_actor,
                 allow_environment_change=allowed, accelerator_type=execution.accelerator_type)  # fmt: skip
    return counts


def requested_images(recipe: Recipe, data: str, request: Request) -> Dataset:
    """Return the images of the requested classes; by default of all classes but the healthy one."""
    if request.classes is not None:
        return open_dataset(data, recipe.data, request.classes)
    dataset = open_dataset(data, recipe.data)
    healthy = recipe.data.healthy_class
    images = [image for image in dataset.images if image.label != healthy]
    if not images:
        raise UnusableData(
            f"--data {data}: contains only the healthy class {healthy}; name the classes to generate with --classes"
        )
    return replace(dataset, images=images)


def _untrained_note(dataset: Dataset, recipe: Recipe) -> str | None:
    """A note about classes that the model has no training prompt for."""
    unknown = [label for label in dataset.classes if label not in recipe.data.prompts]
    trained = ", ".join(recipe.data.prompts)
    return f"the model was not trained on class {', '.join(unknown)}, but on {trained}" if unknown else None


def _check_conditions(recipe: Recipe, model: ModelFolder, plan: pa.Table) -> None:
    """Raises UnusableModel for a wrong number of weights, UnusableData for condition images that the data lack."""
    try:
        weights = recipe.generate.controlnet.weights(model.controls)
    except ValueError as error:
        raise UnusableModel(f"--model {model.uri}: {error}") from None
    read = [name for conditions, weight in zip(model.controls, weights, strict=True) if weight for name in conditions]
    for column in own_columns(read):
        if column not in plan.column_names:
            raise UnusableData(
                f"method controlnet: the model reads a condition image of every image, and the data set has no column "
                f"{column}; add it to the table of --data, or give this ControlNet the weight 0"
            )


def check_plan(recipe: Recipe, model: ModelFolder, plan: pa.Table) -> None:
    """Check that the model can do what is planned. Raises UnusableModel, UnusableData, PromptTooLong."""
    for method in plan["method"].unique().to_pylist():
        needed = METHODS[method].needs
        if needed and not model.has(needed):
            kind = needed.replace("_", "-")
            raise UnusableModel(
                f"--model {model.uri}: method {method} needs a {kind}, which this model lacks; train one with a stage "
                f"that `trains: {kind}`"
            )
        if needed == "controlnet":
            _check_conditions(recipe, model, plan)
    config = recipe.generate
    planned = plan["prompt"].unique().to_pylist()
    prompts = dict.fromkeys((text for prompt in planned for text in texts_of(prompt)), "--prompt")
    for prompt in (config.source_prompt, config.negative_prompt):
        if prompt not in ("", GUESS, SOURCE):
            prompts.setdefault(prompt, "generate.source_prompt or negative_prompt")
    asked = [prompt for prompt, option in prompts.items() if option == "--prompt"]
    for note in model.prompt_notes(asked, trained_texts(recipe.data)):
        LOG.info("%s", note)
    limit, too_long = model.too_long(prompts)
    if too_long:
        option, displayed = prompts[too_long[0]], too_long[0]
        displayed = displayed if len(displayed) <= 60 else displayed[:59] + "…"
        raise PromptTooLong(f"{option} {displayed!r}: more than the {limit} tokens this model reads; make it shorter")
