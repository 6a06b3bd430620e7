"""One planned shard from bytes to commit: read, generate, measure, write; the Parquet part comes last and is the
commit.

No Ray in here: a Ray actor and a plain loop call the same ``run_shard``.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from diffva_ray._version import __version__
from diffva_ray.counterfactual.engine import CounterfactualEngine, SamplingSettings
from diffva_ray.data.encoding import quantise
from diffva_ray.data.images import MAX_BYTES, BadImage, decode_square, read_mask
from diffva_ray.data.memory_limit import MemoryLimit
from diffva_ray.generate.attempts import DEATHS, Attempt, OutOfMemory, Session
from diffva_ray.generate.data_identity import check_there, readable
from diffva_ray.generate.postprocessing import Finished, Pair, Postprocessor
from diffva_ray.generate.run import Run, Unfinished, find_run, part
from diffva_ray.metrics.feature_set import npz
from diffva_ray.metrics.features import Extractor, stand_in
from diffva_ray.metrics.validity import Judge, load_judge
from diffva_ray.model.bundle import load
from diffva_ray.progress import Stopwatch, one_line
from diffva_ray.schema import RECORDS, Row, Status
from diffva_ray.storage.store import Store, StoreError, open_store, patiently

READERS = 8  # images that are read at once
READING = MemoryLimit(MAX_BYTES)  # bytes of images in memory


@dataclass
class WorkerContext:
    """What a worker holds between shards: the run, the data, the model on its device."""

    run: Run
    data: Store
    engine: CounterfactualEngine
    judge: Judge | None
    extractor: Extractor = field(default_factory=stand_in)
    session: Session = field(default_factory=Session)

    @classmethod
    def open(
        cls, run_uri: str, data_uri: str, model_uri: str, device: str | None = None, session: Session | None = None
    ) -> WorkerContext:
        """Load everything a shard needs. Raises UnusableModel, or Unfinished when the model is not the run's."""
        run = find_run(open_store(run_uri))
        if run is None:
            raise Unfinished(f"{run_uri}: no run there")
        bundle = load(model_uri, run.recipe)
        if bundle.digest != run.keys["model_digest"]:
            raise Unfinished(f"--model {model_uri}: not the model that {run_uri} was planned with")
        engine = CounterfactualEngine(bundle, run.recipe.generate, device)
        try:
            if run.recipe.generate.compile:
                engine.compile()
            judge = load_judge(open_store(model_uri))
        except ValueError as error:
            raise Unfinished(str(error)) from None
        return cls(run, open_store(data_uri), engine, judge, session=session or Session())

    def postprocessor(self) -> Postprocessor:
        config = self.run.recipe.generate
        return Postprocessor(self.run.store, self.engine.watch, config, self.judge, self.extractor)


@dataclass
class Source:
    """An image as read for a record: its square, or why there is none."""

    row: Row
    square: NDArray[np.float32] | None = None
    lungs: NDArray[np.bool_] | None = None
    found: Row = field(default_factory=dict)  # image_sha256, width, height; or status and error
    absent: bool = False  # there is no such file, or no permission to read it
    busy: float = 0.0  # seconds that reading it took, and of them decoding it
    decoding: float = 0.0


def run_shard(context: WorkerContext, shard: int) -> dict[str, Any]:
    """Make and commit one shard; returns a small report. A shard that is committed already is left alone.

    ``seconds`` are by stage: read and decode_images (waiting for images, which are read ahead), encode, denoise,
    decode, metrics and write (waiting for pairs, which are measured and stored beside the work, and for the commit).

    A store that fails is tried again after a pause. Raises StoreError when it goes on failing, OutOfMemory, and
    WorkersKeepDying.
    """
    return patiently(lambda: _run_shard(context, shard))


def _run_shard(context: WorkerContext, shard: int) -> dict[str, Any]:
    run, store, watch = context.run, context.run.store, context.engine.watch
    watch.seconds = {}
    commit = f"records/{part(shard)}.parquet"
    if store.exists(commit):
        return {"shard": shard, "records": 0, "ok": 0, "seconds": watch.seconds}
    rows = run.shard_rows(shard)
    with Attempt(store, shard, context.session) as attempt:
        try:
            made = (_one_by_one if attempt.isolated else _together)(context, rows, attempt)
        except torch.cuda.OutOfMemoryError as error:
            attempt.ran_out_of_memory()
            raise OutOfMemory(
                f"{part(shard)}: {one_line(error, 160)}; give each actor more of a GPU, or make a new "
                "run with a smaller --micro-batch (it changes pixels, so this run keeps its own)"
            ) from error
        finished = [one.row for one in made]
        with watch("write"):
            if any(one.features for one in made):
                store.put(f"features/{part(shard)}.npz", _features(context.extractor.name, made))
            seconds = {stage: round(value, 4) for stage, value in watch.seconds.items()}
            store.put(f"timings/{part(shard)}.json", json.dumps(seconds).encode())
            store.put_if_absent(commit, records_part(run, shard, finished))
        attempt.settle()
    ok = sum(row["status"] == Status.OK.value for row in finished)
    return {"shard": shard, "records": len(finished), "ok": ok, "seconds": watch.seconds}


def _together(context: WorkerContext, rows: list[Row], attempt: Attempt) -> list[Finished]:
    """The usual way: micro-batch after micro-batch, while the next images are read and the last pairs are finished."""
    size, watch, sources = context.run.recipe.generate.micro_batch, context.engine.watch, list[Source]()
    reading = ThreadPoolExecutor(READERS)
    try:
        with context.postprocessor() as postprocessor:
            images = [reading.submit(read_source, context, row) for row in rows]
            for start in range(0, len(images), size):  # slices of the plan: which neighbours are bad changes nothing
                with watch("read"):
                    some = [image.result() for image in images[start : start + size]]
                for done in _generate(context, some):
                    postprocessor.give(done)
                sources += some
            _check_absent(context, sources)
            _share_reading(watch, sources)
            return postprocessor.rows()
    finally:
        reading.shutdown(cancel_futures=True)


def _one_by_one(context: WorkerContext, rows: list[Row], attempt: Attempt) -> list[Finished]:
    """After a worker died on this shard: every record alone, suspects first, known killers not at all. Padding makes a
    record's pixels the same alone as in company."""
    limit, killers, watch = DEATHS[attempt.session.executor], attempt.killers, context.engine.watch
    order, sources = sorted(rows, key=lambda row: -attempt.blamed[row["record_id"]]), list[Source]()
    with context.postprocessor() as postprocessor:
        for row in order:
            if row["record_id"] in killers:
                reason = f"its process died {limit} times while this record alone was in flight"
                postprocessor.give({**row, "status": Status.KILLED_WORKER.value, "error": reason})
                continue
            with attempt.flight(row["record_id"]):  # whose own fault a death while storing would not be
                with watch("read"):
                    sources.append(read_source(context, row))
                done = _generate(context, sources[-1:])[0]
                with watch("metrics"):
                    measured = postprocessor.measure(done) if isinstance(done, Pair) else done
            with watch("write"):
                postprocessor.give(measured).result()
        _check_absent(context, sources)
        _share_reading(watch, sources)
        made = {one.row["record_id"]: one for one in postprocessor.rows()}
    return [made[row["record_id"]] for row in rows]


def _check_absent(context: WorkerContext, sources: Sequence[Source]) -> None:
    """Raises StoreError, and so nothing is committed, where images are absent because the data set is, or was while the
    others were read."""
    absent = [source.row for source in sources if source.absent]
    if absent:
        check_there(context.run.about, context.data)
    for row in absent:
        if row["image_size"] >= 0 and readable(context.data, row["image_path"]):
            raise StoreError(f"{context.data.uri}/{row['image_path']} was not there a moment ago, and is again")


def _share_reading(watch: Stopwatch, sources: Sequence[Source]) -> None:
    """Of the time spent waiting for images, decoding has its share of the threads' time (stage ``decode_images``)."""
    busy, decoding = sum(source.busy for source in sources), sum(source.decoding for source in sources)
    share = watch.seconds.get("read", 0.0) * decoding / max(busy, 1e-9)
    watch.seconds |= {"read": watch.seconds.get("read", 0.0) - share, "decode_images": share}


def read_source(context: WorkerContext, row: Row) -> Source:
    """Fetch and decode one image; whatever is wrong with it becomes a status and a reason."""
    config, size = context.run.recipe.generate, context.engine.size
    source, began = Source(row), time.perf_counter()
    try:
        if not context.engine.fits(row["prompt"]):
            raise BadImage(
                f"prompt has more than {context.engine.bundle.tokenizer.model_max_length} tokens",
                Status.PROMPT_TOO_LONG,
            )
        planned = row["image_size"]
        if planned > MAX_BYTES:
            raise BadImage(f"the file has {planned:,} bytes; at most {MAX_BYTES:,} are read")
        # What was not listed is absent, or no plain file; waiting for a pipe would never end.
        if planned < 0 and not context.data.exists(row["image_path"]):
            raise FileNotFoundError
        with READING(max(planned, 0)):
            data = context.data.read(row["image_path"])
            if len(data) != planned and planned >= 0:
                raise BadImage(f"source changed since planning: {planned} bytes then, {len(data)} now", Status.ERROR)
            fetched = time.perf_counter()
            source.square, (height, width) = decode_square(data, size, config.min_side, context.run.recipe.data.bits)
            source.decoding = time.perf_counter() - fetched
            source.found = {"image_sha256": hashlib.sha256(data).hexdigest(), "height": height, "width": width}
        if row["lung_mask_path"]:
            source.lungs = read_mask(context.data, row["lung_mask_path"], size)
    except BadImage as error:
        source.found |= {"status": error.status.value, "error": str(error)}
        source.square = None
    except (FileNotFoundError, NotADirectoryError):
        source.found, source.absent = {"status": Status.MISSING.value, "error": "no such file"}, True
    except (OSError, ValueError) as error:
        source.absent = isinstance(error, PermissionError)
        source.found = {"status": Status.ERROR.value, "error": one_line(f"{type(error).__name__}: {error}")}
    source.busy = time.perf_counter() - began
    return source


def _generate(context: WorkerContext, sources: Sequence[Source]) -> list[Pair | Row]:
    """One fixed-shape call of the engine: a pair of each image, or the row of a record that has none. Slots of
    unreadable images are blank; a padded tail is the engine's affair."""
    if not any(source.square is not None for source in sources):
        return [{**source.row, **source.found} for source in sources]
    blank = np.zeros((context.engine.size, context.engine.size), np.float32)
    with context.engine.watch("denoise"):  # but for what the engine itself counts as encoding and decoding
        counterfactuals = context.engine(
            [blank if source.square is None else source.square for source in sources],
            [
                SamplingSettings(
                    prompt="" if source.square is None else source.row["prompt"],
                    method=source.row["method"],
                    scheduler=source.row["scheduler"],
                    strength=source.row["strength"],
                    guidance_scale=source.row["guidance_scale"],
                    num_inference_steps=source.row["num_inference_steps"],
                )
                for source in sources
            ],
            [source.row["seed"] for source in sources],
            [source.lungs for source in sources],
        )
    done: list[Pair | Row] = []
    for source, counterfactual, reconstruction, shown in zip(
        sources,
        counterfactuals.counterfactuals,
        counterfactuals.reconstructions,
        counterfactuals.source_prompts,
        strict=True,
    ):
        row = {**source.row, **source.found}
        if source.square is None:
            done.append(row)
            continue
        row["source_prompt"] = shown
        if np.isfinite(counterfactual).all() and np.isfinite(reconstruction).all():
            done.append(Pair(row, source.square, source.lungs, quantise(counterfactual), quantise(reconstruction)))
        else:
            reason = "the networks gave NaN or infinity for this image"
            done.append({**row, "status": Status.NON_FINITE.value, "error": reason})
    return done


def _features(name: str, made: Sequence[Finished]) -> bytes:
    """float32 features by extractor, with the ids of their rows."""
    found = [(one.row["record_id"], *one.features) for one in made if one.features is not None]
    ids, sources, counterfactuals = zip(*found, strict=True)
    arrays = {f"{name}/source": np.stack(sources), f"{name}/counterfactual": np.stack(counterfactuals)}
    return npz({"ids": np.array(ids), **arrays})


def records_part(run: Run, shard: int, rows: list[Row]) -> bytes:
    """The commit of a shard, serialised in memory so that no half of it can ever be seen."""
    extra = {"model_digest": run.keys["model_digest"], "attribution_kind": run.recipe.generate.map_name}
    full = [{**extra, **row} for row in rows]
    table = pa.Table.from_pylist([{name: row.get(name) for name in RECORDS.names} for row in full], schema=RECORDS)
    about = {"fingerprint": run.fingerprint, "shard": str(shard), "diffva_ray": __version__}
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(about), sink, compression="zstd")
    return sink.getvalue()
