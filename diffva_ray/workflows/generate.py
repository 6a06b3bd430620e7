"""``diffva generate`` and ``diffva retry``: a run is planned or continued, and its pending shards are carried out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from diffva_ray.config.methods import METHODS
from diffva_ray.config.recipe import (
    GUESS,
    SOURCE,
    Recipe,
)
from diffva_ray.data.bit_depth import bit_depth_note
from diffva_ray.data.dataset import Dataset, UnusableData
from diffva_ray.data.datasets import open_dataset
from diffva_ray.generate.committed import start_retry
from diffva_ray.generate.data_identity import check_same, content_sample, moved
from diffva_ray.generate.failure_threshold import check_first_shards
from diffva_ray.generate.keys import keys_now, pixel_keys
from diffva_ray.generate.plan import PromptTooLong, Request, make_plan
from diffva_ray.generate.run import (
    PLAN_FILE,
    SUCCESS,
    Run,
    continue_run,
    find_run,
    remember_data,
    start_run,
)
from diffva_ray.model.card import UnusableModel, folder_digest, judge_card, prompt_limit, read_card
from diffva_ray.progress import LOG, Progress
from diffva_ray.provenance import provenance, torch_version
from diffva_ray.storage.store import Store, absolute, open_store
from diffva_ray.workflows.execution import Execution


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
    dataset = requested_images(recipe, data, request)
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


def requested_images(recipe: Recipe, data: str, request: Request) -> Dataset:
    """The images of the classes asked for; by default of all but the healthy one."""
    if request.classes is not None:
        return open_dataset(data, recipe.data, request.classes)
    dataset = open_dataset(data, recipe.data)
    healthy = recipe.data.healthy_class
    images = [image for image in dataset.images if image.label != healthy]
    if not images:
        raise UnusableData(
            f"--data {data}: holds only the healthy class {healthy}; name what to generate with --classes"
        )
    return replace(dataset, images=images)


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
    from diffva_ray.distributed import session

    with session.connect() as private:
        if private and execution.gpus_per_actor:
            session.check_room(f"--gpus-per-actor {execution.gpus_per_actor:g}", GPU=execution.gpus_per_actor)
        share = execution.gpus_per_actor  # asked for, it is waited for: an autoscaling cluster has no GPU yet
        return work("cuda" if (session.gpus() if share is None else share) else "cpu")


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
        from diffva_ray.generate.shard import WorkerContext, run_shard

        bench = WorkerContext.open(run.store.uri, run.about["data_root"], model)
        for shard in pending:
            on_shard(run_shard(bench, shard))
    else:
        from diffva_ray.distributed.generate import generate

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
