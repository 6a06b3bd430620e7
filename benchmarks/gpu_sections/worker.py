"""Section 5, a worker: the product's shards from files to commits, beside the bare engine on the same images."""

from __future__ import annotations

import os
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.encoding import quantise
from diffva_ray.data.phantoms import phantom, write_image
from diffva_ray.generate.keys import pixel_keys
from diffva_ray.generate.plan import Request, make_plan
from diffva_ray.generate.run import start_run
from diffva_ray.generate.shard import run_shard
from diffva_ray.generate.worker import WorkerContext
from diffva_ray.provenance import torch_version
from diffva_ray.storage.local import LocalStore
from gpu_sections.book import Book, Values
from gpu_sections.measure import forget_peak, peak_gib, settle, switched, switches, watched
from gpu_sections.subject import Subject, generate, setting

CLASSES = ("COVID", "Lung_Opacity")


def section(book: Book, subject: Subject) -> None:
    sizes = subject.sizes
    data = subject.scratch / "phantoms"
    if book.row("phantoms", lambda: write_phantoms(data, sizes.records, subject.recipe.model.resolution)) is None:
        return
    engines: list[CounterfactualEngine] = []

    def load() -> Values:
        engines.append(subject.engine())
        return {"switches_of_the_engine": switches()}

    with switched():  # which the engine may then set otherwise
        if book.row("engine", load) is not None:
            shards(book, subject, engines[0], str(data))


def shards(book: Book, subject: Subject, engine: CounterfactualEngine, data: str) -> None:
    sizes = subject.sizes
    for steps in sizes.worker_steps:
        for micro_batch in sizes.micro_batches:
            rate: list[float] = []
            at = (steps, micro_batch)
            name = f"{steps} steps, micro-batch {micro_batch}"
            book.row(f"bare engine, {name}", partial(bare, subject, engine, *at, rate), 1.0)
            expected = 1.2 * sizes.records / rate[0] if rate else 1.0
            book.row(f"run_shard, {name}", partial(shard, subject, engine, data, *at, rate), expected)


def write_phantoms(folder: Any, count: int, side: int) -> Values:
    """PNGs with lung masks, as a data set is; an eighth of them is drawn, since a phantom of 512 px takes a second."""
    store, distinct = LocalStore(str(folder)), max(count // 8, 2)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        made = list(pool.map(lambda n: phantom(CLASSES[n % 2], n, 2, side), range(distinct)))
        images = [(quantise(one.image), quantise(one.ground_truth)) for one in made]

        def write(n: int) -> None:
            one, (image, counterfactual) = made[n % distinct], images[n % distinct]
            write_image(store, one.label, n, image, one.lungs, one.lesion, counterfactual)

        list(pool.map(write, range(count)))
    return {"images": count, "distinct": distinct}


def settled(engine: CounterfactualEngine, steps: int, micro_batch: int) -> None:
    changes = {"micro_batch": micro_batch, "num_inference_steps": steps}
    engine.config = engine.config.model_copy(update=changes)


def bare(subject: Subject, engine: CounterfactualEngine, steps: int, micro_batch: int, rate: list[float]) -> Values:
    """One call with pixels that lie in memory."""
    settled(engine, steps, micro_batch)
    images, asked = subject.images(micro_batch), setting(num_inference_steps=steps)
    generate(engine, images, setting(num_inference_steps=4))
    settle(subject.device)
    began = time.perf_counter()
    generate(engine, images, asked)
    settle(subject.device)
    rate.append(micro_batch / (time.perf_counter() - began))
    return {"images_per_second": round(rate[0], 3)}


def shard(
    subject: Subject, engine: CounterfactualEngine, data: str, steps: int, micro_batch: int, rate: list[float]
) -> Values:
    """All records in one shard on local disk; the judge is left out, since random networks have none."""
    settled(engine, steps, micro_batch)
    changes = {"micro_batch": micro_batch, "num_inference_steps": steps, "shard_size": subject.sizes.records}
    recipe = subject.recipe.model_copy(update={"generate": engine.config.model_copy(update=changes)})
    dataset, request = open_dataset(data, recipe.data), Request()
    keys = pixel_keys(recipe, request, "random weights", torch_version(), subject.device.type)
    out = LocalStore(str(subject.scratch / f"run-{steps}-{micro_batch}"))
    about = {"recipe": recipe.model_dump(mode="json"), "data": data, "data_root": dataset.store.uri}
    run = start_run(out, make_plan(dataset, recipe, request), keys, about)
    bench = WorkerContext(run, dataset.store, engine, judge=None)
    with watched(subject.device) as busy:
        forget_peak(subject.device)
        began, cpu = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        reports = [run_shard(bench, number) for number in run.pending()]
        wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    records, ok = (sum(report[key] for report in reports) for key in ("records", "ok"))
    spent = after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime
    return {
        "images_per_second": round(records / wall, 3),
        "host_efficiency": round(records / wall / rate[0], 3) if rate else None,
        "cpu_seconds_per_image": round(spent / records, 3),
        "records": records,
        "ok": ok,
        **busy.values(),
        "peak_gib": peak_gib(subject.device),
        "stage_seconds": {stage: round(value, 2) for stage, value in reports[0]["seconds"].items()},
    }
