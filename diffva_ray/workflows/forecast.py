"""``diffva generate --dry-run``: what a run would do, and what it would cost."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from diffva_ray.config.recipe import Recipe, make_recipe
from diffva_ray.config.sampling import SamplingSettings
from diffva_ray.data.bit_depth import checked_bit_depth
from diffva_ray.data.dataset import UnusableData
from diffva_ray.generate.cost import Pace, cost, estimate
from diffva_ray.generate.keys import pixel_keys
from diffva_ray.generate.plan import Request, make_plan
from diffva_ray.generate.run import ENVIRONMENT, FOLDERS, continue_run, find_run, open_run, part
from diffva_ray.model.card import ModelFolder
from diffva_ray.provenance import torch_version
from diffva_ray.storage.opening import open_store
from diffva_ray.workflows.execution import Execution
from diffva_ray.workflows.generate import check_plan, generate_run, requested_images
from diffva_ray.workflows.status import read_status

ROW_BYTES = 1500  # of a record's row and features, in a shard of usual size


def planned(recipe: Recipe, data: str, model: str, out: str, request: Request) -> dict[str, Any]:
    """Return what ``diffva generate`` would do, without writing anything. Raises the same errors, except for those that
    depend on the device."""
    # A run that exists is continued.
    folder = ModelFolder(model)
    run = find_run(open_store(out))
    if run is not None:
        keys = pixel_keys(recipe, request, folder.digest, torch_version(), run.keys["device"])
        continue_run(run, {**keys, **{key: run.keys.get(key) for key in ENVIRONMENT}})
        counts = {"records": run.about["records"], "shards": run.shards, "pending": len(run.pending())}
        return {"out": out, **counts, "summary": _described(recipe, run.plan(), request)}

    # Otherwise a new run is planned.
    dataset = requested_images(recipe, data, request)
    checked_bit_depth(dataset)
    table = make_plan(dataset, recipe, request)
    check_plan(recipe, folder, table)
    shards = len(set(table["shard"].to_pylist()))
    counts = {"records": len(table), "shards": shards, "pending": shards}
    return {"data": data, "out": out, **counts, "summary": _described(recipe, table, request)}


def _described(recipe: Recipe, plan: pa.Table, request: Request) -> list[str]:
    """Classes with their prompts, and sampling settings, in lines for users."""
    planned = Counter(zip(plan["label"].to_pylist(), plan["prompt"].to_pylist(), strict=True))
    settings = {**{key: getattr(recipe.generate, key) for key in SamplingSettings.model_fields}, **dict(request.sweep)}
    return [
        *(f"class {label}: {count} records, prompt {prompt!r}" for (label, prompt), count in planned.items()),
        ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in settings.items()),
    ]


def planned_cost(
    recipe: Recipe, intent: dict[str, Any], out: str, request: Request, execution: Execution, pace: Pace | None
) -> dict[str, Any]:
    """Return the cost of the remaining work at ``out``: counts (``generate.cost.cost``), and estimates if a pace is
    known, either the given one or that of the run's finished shards."""
    run = find_run(open_store(out))
    records, sweep, prompt = intent["records"], request.sweep, request.prompt
    if run is not None:
        status = read_status(out)
        records, sweep, recipe = status["planned"] - status["done"], run.keys["sweep"], run.recipe
        prompt = run.keys["prompt"]
        if pace is None and status["done"]:
            seconds = sum(status["seconds_by_stage"].values()) / status["done"]
            pace = Pace(seconds, None, run.keys["device"])
    total = cost(recipe, sweep, records, prompt)
    if pace is not None:
        total |= estimate(pace, records, execution.actors, execution.gpus_per_actor)
    return total


def probe(recipe: Recipe, data: str, model: str, request: Request) -> Pace:
    """Measure the pace of this machine with a small run of two micro-batches in a temporary folder. The second one is
    measured, the first one warms up; with fewer images, the first one is measured. Of a sweep, only the first setting
    is run, and the seconds are scaled by the UNet forwards of all. Raises UnusableData if no image can be generated."""
    size = recipe.generate.micro_batch
    small = make_recipe(recipe.model_dump(mode="json"), [f"generate.shard_size={size}"])
    first_setting = tuple((key, values[:1]) for key, values in request.sweep)
    short = replace(request, limit=min(request.limit or 2 * size, 2 * size), sweep=first_setting)
    with tempfile.TemporaryDirectory(prefix="diffva-probe-") as folder:
        generate_run(small, data, model, folder, short, Execution(executor="inline"))
        run = open_run(folder)
        shard = run.shards - 1 if run.shard_sizes()[run.shards - 1] == size else 0  # a padded batch costs the same
        images = [file for kind in FOLDERS for file in (Path(folder) / kind / part(shard)).glob("*.png")]
        if not images:
            raise UnusableData(
                f"--probe: none of the first images of {data} could be generated; see diffva inspect {data}"
            )

        # Seconds and bytes of one record.
        seconds = sum(json.loads(run.store.read(f"timings/{part(shard)}.json")).values()) / run.shard_sizes()[shard]
        stored = sum(file.stat().st_size for file in images) / (len(images) / len(FOLDERS)) + ROW_BYTES
        if request.sweep:
            costs = [cost(recipe, sweep, 1, request.prompt) for sweep in (request.sweep, first_setting)]
            forwards = [each["unet_forwards_per_record"] for each in costs]
            seconds *= forwards[0] / forwards[1] if forwards[1] else 1.0
        return Pace(seconds, stored, run.keys["device"])


def micro_batches(recipe: Recipe, model: str) -> dict[int, float]:
    """Measure images per second of this machine's engine by micro-batch size, which is doubled until it gains less than
    5 % or no longer fits into the device's memory. The image is blank, because the time does not depend on it. The size
    is set as ``generate.micro_batch``; a run records it, because it changes the last bits of pixels."""
    import torch

    from diffva_ray.counterfactual.engine import CounterfactualEngine
    from diffva_ray.model.bundle import load

    engine = CounterfactualEngine(load(model, recipe), recipe.generate)
    image, images_per_second = np.full((engine.size, engine.size), 0.5, np.float32), dict[int, float]()
    conditions = dict.fromkeys(engine.condition_columns(), np.stack([image] * 3))
    for size in (1, 2, 4, 8, 16, 32, 64, 128):
        engine.config = recipe.generate.model_copy(update={"micro_batch": size})
        try:
            rates = []
            for _ in range(4):  # the first call warms up
                began = time.perf_counter()
                engine([image] * size, list(range(size)), conditions=[conditions] * size)
                rates.append(size / (time.perf_counter() - began))
        except (torch.OutOfMemoryError, MemoryError):
            break
        except RuntimeError as error:  # of the allocator of a CPU
            if "allocate memory" not in str(error):
                raise
            break
        images_per_second[size] = statistics.median(rates[1:])
        if size > 1 and images_per_second[size] < 1.05 * images_per_second[size // 2]:
            break
    return images_per_second
