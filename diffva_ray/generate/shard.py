"""One planned shard from bytes to commit: read, heal, measure, write; the Parquet part comes last and is the commit.

No Ray in here: a Ray actor and a plain loop call the same ``run_shard``.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from diffva_ray import __version__
from diffva_ray.counterfactual.engine import Counterfactuals, Settings
from diffva_ray.data.images import (
    MAX_BYTES,
    Admission,
    BadImage,
    decode_mask,
    decode_square,
    encode_grey,
    encode_map,
    one_line,
    quantise,
)
from diffva_ray.generate.attempts import DEATHS, Attempt, OutOfMemory, Session
from diffva_ray.generate.measures import measure, unit
from diffva_ray.generate.plan import FOLDERS, Run, Unfinished, open_run, part
from diffva_ray.metrics.features import Extractor, stand_in
from diffva_ray.metrics.validity import Judge, load_judge
from diffva_ray.model.bundle import load
from diffva_ray.observe import Stopwatch
from diffva_ray.schema import RECORDS, Status
from diffva_ray.storage import Store, open_store, patiently

Row = dict[str, Any]
Features = dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]  # by record: of the film, of its counterfactual
WRITERS = 4  # images that are made and stored at once beside the work
MOST_PENDING = 64  # images that wait for that
READING = Admission(MAX_BYTES)  # bytes of films in memory


@dataclass
class Workbench:
    """What a worker holds between shards: the run, the data, the model on its device."""

    run: Run
    data: Store
    engine: Counterfactuals
    judge: Judge | None
    extractor: Extractor = field(default_factory=stand_in)
    session: Session = field(default_factory=Session)

    @classmethod
    def open(
        cls, run_uri: str, data_uri: str, model_uri: str, device: str | None = None, session: Session | None = None
    ) -> Workbench:
        """Load everything a shard needs. Raises UnusableModel, or Unfinished when the model is not the run's."""
        run = open_run(open_store(run_uri))
        if run is None:
            raise Unfinished(f"{run_uri}: no run there")
        bundle = load(model_uri, run.recipe)
        if bundle.digest != run.about["keys"]["model_digest"]:
            raise Unfinished(f"--model {model_uri}: not the model that {run_uri} was planned with")
        engine = Counterfactuals(bundle, run.recipe.generate, device)
        try:
            judge = load_judge(open_store(model_uri))
        except ValueError as error:
            raise Unfinished(str(error)) from None
        return cls(run, open_store(data_uri), engine, judge, session=session or Session())


@dataclass
class Source:
    """A film as read for a record: its square, or why there is none."""

    row: Row
    square: NDArray[np.float32] | None = None
    lungs: NDArray[np.bool_] | None = None
    found: Row = field(default_factory=dict)  # source_sha256, width, height; or status and error
    busy: float = 0.0  # seconds that reading it took, and of them to decode it
    decoding: float = 0.0


def run_shard(bench: Workbench, shard: int) -> dict[str, Any]:
    """Make and commit one shard; returns a small report. A shard that is committed already is left alone.

    ``seconds`` are by stage: read (files fetched), decode_films, encode, denoise, decode, metrics, write (waiting for
    PNGs, which are made and stored beside the work, and for the commit).

    A store that fails is tried again after a pause. Raises StoreError when it goes on failing, OutOfMemory, and
    WorkersKeepDying.
    """
    return patiently(lambda: _run_shard(bench, shard))


def _run_shard(bench: Workbench, shard: int) -> dict[str, Any]:
    run, store, watch = bench.run, bench.run.store, bench.engine.watch
    watch.seconds = {}
    commit = f"records/{part(shard)}.parquet"
    if store.exists(commit):
        return {"shard": shard, "records": 0, "ok": 0, "seconds": watch.seconds}
    rows, features = run.shard_rows(shard), Features()
    with Attempt(store, shard, bench.session) as attempt, Writer(store, watch) as writer:
        try:
            work = _one_by_one if attempt.isolated else _together
            finished = work(bench, rows, attempt, features, writer)
        except torch.cuda.OutOfMemoryError as error:
            attempt.ran_out_of_memory()
            raise OutOfMemory(
                f"{part(shard)}: {' '.join(str(error).split())[:160]}; give each actor more of a GPU, or make a new "
                "run with a smaller --micro-batch (it changes pixels, so this run keeps its own)"
            ) from error
        writer.wait()
        with watch("write"):
            if features:
                store.put(f"features/{part(shard)}.npz", _features(bench.extractor.name, features))
            seconds = {stage: round(value, 4) for stage, value in watch.seconds.items()}
            store.put(f"timings/{part(shard)}.json", json.dumps(seconds).encode())
            store.put_if_absent(commit, records_part(run, shard, finished))
        attempt.settle()
    ok = sum(row["status"] == Status.OK.value for row in finished)
    return {"shard": shard, "records": len(finished), "ok": ok, "seconds": watch.seconds}


class Writer:
    """Makes and stores images in threads, beside the work; whoever commits waits for all of them first."""

    def __init__(self, store: Store, watch: Stopwatch) -> None:
        self.store, self.watch = store, watch
        self.pool = ThreadPoolExecutor(WRITERS)
        self.jobs: deque[Future[None]] = deque()

    def put(self, path: str, encode: Callable[[], bytes]) -> None:
        """Waits while a store that is slower than the work has MOST_PENDING images to take, and raises what an earlier
        image raised: nothing is healed for a store that has failed."""
        while self.jobs and (self.jobs[0].done() or len(self.jobs) >= MOST_PENDING):
            with self.watch("write"):
                self.jobs.popleft().result()
        self.jobs.append(self.pool.submit(lambda: self.store.put(path, encode())))

    def wait(self) -> None:
        """Until everything is stored. Raises what a thread raised, StoreError for one."""
        with self.watch("write"):
            while self.jobs:
                self.jobs.popleft().result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.pool.shutdown(cancel_futures=kind is not None)


def _together(bench: Workbench, rows: list[Row], attempt: Attempt, features: Features, writer: Writer) -> list[Row]:
    """The usual way: all films read at once, then micro-batch after micro-batch."""
    watch = writer.watch
    sources = _read(bench, rows, watch)
    size, finished = bench.run.recipe.generate.micro_batch, []
    for start in range(0, len(sources), size):  # slices of the plan: which neighbours are bad changes nothing
        for made in _micro_batch(bench, sources[start : start + size], watch):
            finished.append(_keep(made, features, writer))
    return finished


def _one_by_one(bench: Workbench, rows: list[Row], attempt: Attempt, features: Features, writer: Writer) -> list[Row]:
    """After a worker died on this shard: every record alone, suspects first, known killers not at all. Padding makes a
    record's pixels the same alone as in company."""
    limit, killers = DEATHS[attempt.session.executor], attempt.killers
    done: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: -attempt.blamed[row["record_id"]]):
        key = row["record_id"]
        if key in killers:
            reason = f"its process died {limit} times while this record alone was in flight"
            done[key] = {**row, "status": Status.KILLED_WORKER.value, "error": reason}
            continue
        with attempt.flight(key):
            made = _micro_batch(bench, _read(bench, [row], writer.watch), writer.watch)[0]
        done[key] = _keep(made, features, writer)
    for key in [row["record_id"] for row in rows if row["record_id"] in features]:
        features[key] = features.pop(key)  # back into the plan's order
    return [done[row["record_id"]] for row in rows]


def _read(bench: Workbench, rows: list[Row], watch: Stopwatch) -> list[Source]:
    """The films of records, read side by side; of the time that passes, decoding has its share of the threads' time."""
    before = watch.seconds.get("read", 0.0)
    with watch("read"), ThreadPoolExecutor(8) as pool:
        sources = list(pool.map(lambda row: read_source(bench, row), rows))
    busy, decoding = sum(source.busy for source in sources), sum(source.decoding for source in sources)
    decoding *= (watch.seconds["read"] - before) / max(busy, 1e-9)
    watch.seconds["read"] -= decoding
    watch.seconds["decode_films"] = watch.seconds.get("decode_films", 0.0) + decoding
    return sources


def read_source(bench: Workbench, row: Row) -> Source:
    """Fetch and decode one film; whatever is wrong with it becomes a status and a reason."""
    config, size = bench.run.recipe.generate, bench.engine.size
    source, began = Source(row), time.perf_counter()
    try:
        if not bench.engine.fits(row["prompt"]):
            raise BadImage(
                f"prompt has more than {bench.engine.bundle.tokenizer.model_max_length} tokens", Status.PROMPT_TOO_LONG
            )
        planned = row["source_size"]
        if planned > MAX_BYTES:
            raise BadImage(f"the file has {planned:,} bytes; at most {MAX_BYTES:,} are read")
        # What was not listed is absent, or no plain file; waiting for a pipe would never end.
        if planned < 0 and not bench.data.exists(row["source_path"]):
            raise FileNotFoundError
        with READING(max(planned, 0)):
            data = bench.data.read(row["source_path"])
            if len(data) != planned and planned >= 0:
                raise BadImage(f"source changed since planning: {planned} bytes then, {len(data)} now", Status.ERROR)
            fetched = time.perf_counter()
            source.square, (height, width) = decode_square(data, size, config.min_side)
            source.decoding = time.perf_counter() - fetched
            source.found = {"source_sha256": hashlib.sha256(data).hexdigest(), "height": height, "width": width}
        if row["lung_mask_path"]:
            source.lungs = read_mask(bench.data, row["lung_mask_path"], size)
    except BadImage as error:
        source.found |= {"status": error.status.value, "error": str(error)}
        source.square = None
    except (FileNotFoundError, NotADirectoryError):
        source.found = {"status": Status.MISSING.value, "error": "no such file"}
    except (OSError, ValueError) as error:
        source.found = {"status": Status.ERROR.value, "error": one_line(f"{type(error).__name__}: {error}")}
    source.busy = time.perf_counter() - began
    return source


def read_mask(store: Store, path: str, size: int) -> NDArray[np.bool_] | None:
    """A mask on the model's grid; None when it cannot be read (a mask is an extra, not a reason to lose a record)."""
    try:
        return decode_mask(store.read(path), size)
    except (ValueError, OSError):  # BadImage is a ValueError
        return None


@dataclass
class Made:
    """A record's row, and what it leaves behind where it is ok: what makes its files, by path, and features of film and
    counterfactual."""

    row: Row
    files: dict[str, Callable[[], bytes]] = field(default_factory=dict)
    features: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None


def _micro_batch(bench: Workbench, sources: list[Source], watch: Stopwatch) -> list[Made]:
    """One fixed-shape call of the engine. Slots of unreadable films are blank; a padded tail is the engine's affair."""
    if not any(source.square is not None for source in sources):
        return [Made({**source.row, **source.found}) for source in sources]
    blank = np.zeros((bench.engine.size, bench.engine.size), np.float32)
    with watch("denoise"):  # but for what the engine itself counts as encoding and decoding
        twins = bench.engine(
            [blank if source.square is None else source.square for source in sources],
            [
                Settings(
                    row["prompt"], row["method"], row["scheduler"],
                    row["strength"], row["guidance_scale"], row["num_inference_steps"],
                )
                for row in (source.row for source in sources)
            ],
            [source.row["seed"] for source in sources],
            [source.lungs for source in sources],
        )  # fmt: skip
    finished = []
    for source, counterfactual, reconstruction, shown in zip(
        sources, twins.counterfactuals, twins.reconstructions, twins.sources, strict=True
    ):
        if source.square is None:
            finished.append(Made({**source.row, **source.found}))
            continue
        source.found["source_prompt"] = shown
        if not (np.isfinite(counterfactual).all() and np.isfinite(reconstruction).all()):
            reason = {"status": Status.NON_FINITE.value, "error": "the networks gave NaN or infinity for this film"}
            finished.append(Made({**source.row, **source.found, **reason}))
            continue
        with watch("metrics"):
            finished.append(_measure(bench, source, quantise(counterfactual), quantise(reconstruction)))
    return finished


def _measure(
    bench: Workbench, source: Source, counterfactual: NDArray[np.uint8], reconstruction: NDArray[np.uint8]
) -> Made:
    """The row and the files of one pair."""
    config, row = bench.run.recipe.generate, source.row
    film = source.square
    assert film is not None
    numbers, signed = measure(film, counterfactual, reconstruction, source.lungs, config, bench.judge)
    names = {kind: f"{kind}/{part(row['shard'])}/{row['record_id']}.png" for kind in FOLDERS}
    pair = bench.extractor(np.stack([film, unit(counterfactual)]))
    full = {
        **row,
        **source.found,
        **numbers,
        "counterfactual_path": names["counterfactuals"],
        "attribution_path": names["maps"],
        "reconstruction_path": names["reconstructions"],
        "status": Status.OK.value,
        "error": None,
    }
    files: dict[str, Callable[[], bytes]] = {
        names["counterfactuals"]: partial(encode_grey, counterfactual),
        names["reconstructions"]: partial(encode_grey, reconstruction),
        names["maps"]: partial(encode_map, signed),
    }
    return Made(full, files, (pair[0], pair[1]))


def _keep(made: Made, features: Features, writer: Writer) -> Row:
    """Have a record's files written; its row waits for the commit."""
    for path, encode in made.files.items():
        writer.put(path, encode)
    if made.features is not None:
        features[made.row["record_id"]] = made.features
    return made.row


def _features(name: str, features: Features) -> bytes:
    """float32 features by extractor, with the ids of their rows."""
    sink = io.BytesIO()
    sources, counterfactuals = zip(*features.values(), strict=True)
    arrays: dict[str, Any] = {f"{name}/source": np.stack(sources), f"{name}/counterfactual": np.stack(counterfactuals)}
    np.savez(sink, ids=np.array(list(features)), **arrays)
    return sink.getvalue()


def records_part(run: Run, shard: int, rows: list[Row]) -> bytes:
    """The commit of a shard, serialised in memory so that no half of it can ever be seen."""
    extra = {"model_digest": run.about["keys"]["model_digest"], "map": run.recipe.generate.map_name}
    full = [{**extra, **row} for row in rows]
    table = pa.Table.from_pylist([{name: row.get(name) for name in RECORDS.names} for row in full], schema=RECORDS)
    about = {"fingerprint": run.fingerprint, "shard": str(shard), "diffva_ray": __version__}
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(about), sink, compression="zstd")
    return sink.getvalue()
