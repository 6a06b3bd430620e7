"""Generates one shard: read, generate, score, write. The Parquet part is written last and is the commit.

Nothing here uses Ray: a Ray actor and a plain loop call the same ``run_shard``. Threads of one worker may call it for
several shards at once: one of them generates, while others read their images, or score and store their results.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from diffva_ray.config.sampling import SamplingSettings
from diffva_ray.counterfactual.exact_device import is_device_error, is_out_of_memory
from diffva_ray.data.encoding import quantise
from diffva_ray.data.images import MAX_BYTES, BadImage, decode_with_columns
from diffva_ray.data.memory_limit import MemoryLimit
from diffva_ray.generate.attempts import MAX_RECORD_DEATHS, Attempt, GpuFailed, OutOfMemory
from diffva_ray.generate.companions import condition_image, lung_mask, momentary
from diffva_ray.generate.data_identity import check_there, readable
from diffva_ray.generate.postprocessing import Generation, ProcessedRecord
from diffva_ray.generate.run import part
from diffva_ray.generate.shard_files import AlreadyCommitted, ShardFiles, commit_path, features_path, records_part
from diffva_ray.generate.worker import WorkerContext
from diffva_ray.metrics.feature_set import npz
from diffva_ray.progress import LOG, Stopwatch, one_line
from diffva_ray.schema import PlannedRecord, Record, Results, Status, complete
from diffva_ray.storage.store import Modified, patiently

READ_THREADS = 8
READ_LIMIT = MemoryLimit(MAX_BYTES)  # bytes of image files in memory


@dataclass
class Source:
    """The input image of one record, or the reason why it cannot be read."""

    planned: PlannedRecord
    square: NDArray[np.float32] | None = None  # the image, grey [size, size] in [0, 1]; None: unreadable
    lungs: NDArray[np.bool_] | None = None  # lung mask [size, size]
    conditions: dict[str, NDArray[np.float32]] = field(default_factory=dict)  # own condition images [3, size, size]
    results: Results = field(default_factory=lambda: Results())  # image_sha256, width, height; or status and error
    absent: bool = False  # there is no such file, or no permission to read it
    busy: float = 0.0  # seconds of reading and decoding
    decoding: float = 0.0  # seconds of decoding alone


def run_shard(context: WorkerContext, shard: int) -> dict[str, Any]:
    """Generate and commit one shard, unless it is committed already or by another process meanwhile.

    A failing store is tried again after a pause.

    Args:
        context: The worker's run, data and model.
        shard: Number of the shard in the plan.

    Returns:
        A report: ``shard``, ``records`` and ``ok`` (their numbers; 0 for a shard that another process committed), and
        ``seconds`` by stage: read and decode_images (waiting for images, which are read ahead), encode, denoise,
        decode, metrics and write (waiting for the threads that score and store, and for the commit). The wait for
        another shard of this worker counts nowhere.

    Raises:
        StoreError: The store keeps failing, or the data set is gone.
        OutOfMemory: The device has too little memory for a micro-batch.
        GpuFailed: A GPU reports an error.
        WorkersKeepDying: Too many workers died on this shard.
        PlanError: The plan is missing or is not the run's.
    """
    try:
        return patiently(lambda: _run_shard(context, shard))
    except AlreadyCommitted:
        LOG.info("%s: another process has committed this shard", part(shard))
        return {"shard": shard, "records": 0, "ok": 0, "seconds": {}}


def _run_shard(context: WorkerContext, shard: int) -> dict[str, Any]:
    run, store, watch = context.run, context.run.store, Stopwatch()
    if store.exists(commit_path(shard)):
        return {"shard": shard, "records": 0, "ok": 0, "seconds": {}}
    planned = run.planned(shard)
    _ = context.files  # read once, before the threads need it
    # generate; with markers, in ever smaller groups, if a worker died on this shard before
    attempt = Attempt(store, shard, context.session)
    with context.turns(alone=attempt.isolated), attempt:
        files = ShardFiles(store, shard, attempt.token)
        try:
            process = _in_groups if attempt.isolated else _in_batches
            processed = process(context, planned, attempt, files, watch)
        except RuntimeError as error:
            if is_device_error(error):
                attempt.leave("device")
                raise GpuFailed(
                    f"{part(shard)}: the GPU ({context.engine.device_name}) reports: {one_line(error, 160)}; the same "
                    "command continues in a new process. If it comes again, another GPU or driver is needed"
                ) from error
            if not is_out_of_memory(error):
                raise
            attempt.leave("memory")
            raise OutOfMemory(
                f"{part(shard)}: {one_line(error, 160)}; give each actor more of a GPU, or make a new "
                "run with a smaller --micro-batch (it changes pixels, so it is fixed for this run)"
            ) from error
        # commit: the records come last
        finished = [one.record for one in processed]
        with watch("write"):
            features = features_path(shard)
            if any(one.features for one in processed):
                features = files.write(features, _features(context.extractor.name, processed))
            committed = store.put_if_absent(commit_path(shard), records_part(run, shard, finished, features))
        attempt.clear()
        if not committed:
            raise AlreadyCommitted
        seconds = {stage: round(value, 4) for stage, value in watch.seconds.items()}
        store.put(f"timings/{part(shard)}.json", json.dumps(seconds).encode())
    ok = sum(record["status"] == Status.OK.value for record in finished)
    return {"shard": shard, "records": len(finished), "ok": ok, "seconds": watch.seconds}


def _in_batches(
    context: WorkerContext, planned: list[PlannedRecord], attempt: Attempt, files: ShardFiles, watch: Stopwatch
) -> list[ProcessedRecord]:
    """Process the records in micro-batches, while threads read the next images and store the last results."""
    size, sources = context.run.recipe.generate.micro_batch, list[Source]()
    readers = ThreadPoolExecutor(READ_THREADS)
    try:
        with context.postprocessor(files, watch) as postprocessor:
            images = [readers.submit(read_source, context, record) for record in planned]
            with context.generating(watch):
                for start in range(0, len(images), size):  # batches of the plan: unreadable neighbours change no pixel
                    with watch("read"):
                        batch = [image.result() for image in images[start : start + size]]
                    for item in _generate(context, batch):
                        postprocessor.submit(item)
                    sources += batch
            _check_absent(context, sources)
            _split_read_time(watch, sources)
            return postprocessor.results()
    finally:
        readers.shutdown(cancel_futures=True)


def _in_groups(
    context: WorkerContext, planned: list[PlannedRecord], attempt: Attempt, files: ShardFiles, watch: Stopwatch
) -> list[ProcessedRecord]:
    """Process the records of a shard on which a worker died, group by group: suspects first, poison records not at all.

    Batches are padded, so a record has the same pixels in a smaller group as in a full batch."""
    limit, poison = MAX_RECORD_DEATHS[attempt.session.executor], attempt.poison_records
    sources = list[Source]()
    with context.postprocessor(files, watch) as postprocessor:
        for record in (record for record in planned if record["record_id"] in poison):
            reason = f"its process died {limit} times while this record was the only one in progress"
            killed: Results = {**context.results, "status": Status.KILLED_WORKER.value, "error": reason}
            postprocessor.submit(complete(record, killed))
        for group in attempt.groups(len(planned), context.run.recipe.generate.micro_batch):
            records = [planned[n] for n in group if planned[n]["record_id"] not in poison]
            if not records:
                continue
            alone = len(records) == 1
            mark = attempt.in_progress(records[0]["record_id"]) if alone else attempt.group_in_progress(group)
            with mark:  # without storing: a death there is not the records' fault
                with watch("read"):
                    read = [read_source(context, record) for record in records]
                with context.generating(watch):
                    items = _generate(context, read)
                with watch("metrics"):
                    scored = [postprocessor.score(item) if isinstance(item, Generation) else item for item in items]
            sources += read
            with watch("write"):
                for one in scored:
                    postprocessor.submit(one).result()
        _check_absent(context, sources)
        _split_read_time(watch, sources)
        processed = {one.record["record_id"]: one for one in postprocessor.results()}
    return [processed[record["record_id"]] for record in planned]


def _check_absent(context: WorkerContext, sources: Sequence[Source]) -> None:
    """Raises StoreError, so that nothing is committed, when images are absent because the whole data set is absent, or
    was while they were read."""
    absent = [source.planned for source in sources if source.absent]
    if absent:
        check_there(context.run.about, context.data)
    for record in absent:
        if record["image_size"] >= 0 and readable(context.data, record["image_path"]):
            raise momentary(context.data, record["image_path"])


def _split_read_time(watch: Stopwatch, sources: Sequence[Source]) -> None:
    """Divide the waiting time for images between ``read`` and ``decode_images``, in proportion to the threads' time."""
    busy, decoding = sum(source.busy for source in sources), sum(source.decoding for source in sources)
    share = watch.seconds.get("read", 0.0) * decoding / max(busy, 1e-9)
    watch.seconds |= {"read": watch.seconds.get("read", 0.0) - share, "decode_images": share}


def read_source(context: WorkerContext, planned: PlannedRecord) -> Source:
    """Read and decode one image; anything wrong with it becomes a status and a reason."""
    config, size = context.run.recipe.generate, context.engine.size
    source, began, read = Source(planned), time.perf_counter(), "image"
    try:
        # check what can be checked without reading
        if not context.engine.fits(planned["prompt"]):
            raise BadImage(
                f"prompt has more than {context.engine.bundle.tokenizer.model_max_length} tokens",
                Status.PROMPT_TOO_LONG,
            )
        size_then = planned["image_size"]
        if size_then > MAX_BYTES:
            raise BadImage(f"the file has {size_then:,} bytes; at most {MAX_BYTES:,} are read")
        # an unlisted path is absent or not a regular file; reading a pipe would wait for ever
        if size_then < 0 and not context.data.exists(planned["image_path"]):
            raise FileNotFoundError
        # read and decode
        with READ_LIMIT(max(size_then, 0)):
            data = context.files.read(planned["image_path"])
            if len(data) != size_then and size_then >= 0:
                raise BadImage(f"image changed since planning: {size_then} bytes then, {len(data)} now", Status.ERROR)
            fetched = time.perf_counter()
            bits = context.run.recipe.data.bits
            source.square, (height, width), columns = decode_with_columns(data, size, config.min_side, bits)
            source.decoding = time.perf_counter() - fetched
            source.planned = _with_header(planned, columns)
            source.results = {"image_sha256": hashlib.sha256(data).hexdigest(), "height": height, "width": width}
        read = "mask"
        if planned["lung_mask_path"]:
            source.lungs = lung_mask(context.files, context.run.about, planned["lung_mask_path"], size)
        read = "condition image"
        for column in context.engine.condition_columns(SamplingSettings.of(planned)):
            path = cast("dict[str, str]", planned)[column]
            shape = (height, width)
            source.conditions[column] = condition_image(context.files, context.run.about, column, path, shape, size)
    except Modified as error:
        reason = f"{read} changed since planning ({error})"
        source.results, source.square = {"status": Status.ERROR.value, "error": reason}, None
    except BadImage as error:
        source.results |= {"status": error.status.value, "error": str(error)}
        source.square = None
    except (FileNotFoundError, NotADirectoryError):
        source.results, source.absent = {"status": Status.MISSING.value, "error": "no such file"}, True
    except (OSError, ValueError) as error:
        source.absent = isinstance(error, PermissionError)
        source.results = {"status": Status.ERROR.value, "error": one_line(f"{type(error).__name__}: {error}")}
    source.busy = time.perf_counter() - began
    return source


def _with_header(planned: PlannedRecord, header: dict[str, str]) -> PlannedRecord:
    """The planned record with what the file's header says of patient and view, where the data set says nothing."""
    values = {name: value for name, value in planned.items() if value or name not in header}
    return cast(PlannedRecord, {**planned, **header, **values})


def _generate(context: WorkerContext, sources: Sequence[Source]) -> list[Generation | Record]:
    """Run the engine on one batch of a shard; the result of each image, or the record of one that has none.

    Unreadable images are replaced by zeros to keep the batch shape; the engine pads the last batch."""
    if not any(source.square is not None for source in sources):
        return [complete(source.planned, {**context.results, **source.results}) for source in sources]
    blank = np.zeros((context.engine.size, context.engine.size), np.float32)
    settings = SamplingSettings.of(sources[0].planned)  # equal within a shard
    empty = dict.fromkeys(context.engine.condition_columns(settings), np.stack([blank] * 3))
    with context.engine.watch("denoise"):  # the engine takes its encode and decode times out of it
        batch = context.engine(
            [blank if source.square is None else source.square for source in sources],
            [source.planned["seed"] for source in sources],
            ["" if source.square is None else source.planned["prompt"] for source in sources],
            settings,
            [source.lungs for source in sources],
            [source.conditions if source.square is not None else empty for source in sources],
        )
    items: list[Generation | Record] = []
    for source, counterfactual, reconstruction, source_prompt, in_float32 in zip(
        sources, batch.counterfactuals, batch.reconstructions, batch.source_prompts, batch.in_float32, strict=True
    ):
        results: Results = {**context.results, **source.results}
        if source.square is None:
            items.append(complete(source.planned, results))
            continue
        results["source_prompt"] = source_prompt
        if in_float32:
            results["device"] += ", float32"
        if np.isfinite(counterfactual).all() and np.isfinite(reconstruction).all():
            pair = quantise(counterfactual), quantise(reconstruction)
            items.append(Generation(source.planned, results, source.square, source.lungs, *pair))
        else:
            reason = "the networks returned NaN or infinity for this image"
            results |= {"status": Status.NON_FINITE.value, "error": reason}
            items.append(complete(source.planned, results))
    return items


def _features(name: str, processed: Sequence[ProcessedRecord]) -> bytes:
    """NPZ with the record ids and float32 features of extractor ``name``."""
    kept = [(one.record["record_id"], *one.features) for one in processed if one.features is not None]
    ids, sources, counterfactuals = zip(*kept, strict=True)
    arrays = {f"{name}/source": np.stack(sources), f"{name}/counterfactual": np.stack(counterfactuals)}
    return npz({"ids": np.array(ids), **arrays})
