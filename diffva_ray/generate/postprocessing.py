"""Post-processing in background threads: compute metrics, encode PNGs and store them while the GPU works on the next
batch."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from diffva_ray.config.recipe import GenerateConfig
from diffva_ray.data.encoding import encode_grey, encode_map
from diffva_ray.generate.measures import measure, unit
from diffva_ray.generate.run import FOLDERS, part
from diffva_ray.generate.shard_files import ShardFiles
from diffva_ray.metrics.features import Extractor
from diffva_ray.metrics.validity import Judge
from diffva_ray.progress import Stopwatch
from diffva_ray.schema import PathColumn, PlannedRecord, Record, Results, Status, complete

THREADS = min(16, max(4, (os.cpu_count() or 1) // 4))  # a GPU machine has 8 to 16 cores for each GPU
PENDING_BATCHES = 2  # generations that may wait for a thread, in micro-batches


@dataclass(frozen=True)
class Generation:
    """An image and what the networks generated from it; all arrays are [size, size]."""

    planned: PlannedRecord
    results: Results  # those known so far
    image: NDArray[np.float32]  # grey in [0, 1]
    lungs: NDArray[np.bool_] | None
    counterfactual: NDArray[np.uint8]
    reconstruction: NDArray[np.uint8]


@dataclass(frozen=True)
class ScoredRecord:
    """A record with its metrics, whose files are not written yet."""

    record: Record
    files: dict[PathColumn, Callable[[], bytes]]  # encoder of each file by the column with its path
    features: tuple[NDArray[np.float32], NDArray[np.float32]]  # of image and counterfactual
    seconds: float  # taken by the metrics


@dataclass(frozen=True)
class ProcessedRecord:
    """A record whose files are stored; only an ``ok`` record has files, features and seconds."""

    record: Record
    features: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None  # of image and counterfactual
    scoring: float = 0.0  # seconds taken by the metrics
    storing: float = 0.0  # seconds taken by encoding and storing


class Postprocessor:
    """Processes generations in threads. Call ``results`` before committing a shard; it waits until all is stored."""

    def __init__(
        self, files: ShardFiles, watch: Stopwatch, config: GenerateConfig, judge: Judge | None, extractor: Extractor
    ) -> None:
        self.files, self.watch, self.config, self.judge, self.extractor = files, watch, config, judge, extractor
        self.max_pending = PENDING_BATCHES * max(config.micro_batch, THREADS)
        # torch starts each thread with all cores, and thread counts change the last bits of features
        self.pool = ThreadPoolExecutor(THREADS, "postprocess", torch.set_num_threads, (config.cpu_threads,))
        self.pending: deque[Future[ProcessedRecord]] = deque()
        self.submitted: list[Future[ProcessedRecord]] = []

    def submit(self, item: Generation | ScoredRecord | Record) -> Future[ProcessedRecord]:
        """Process a generation, scored or not, or pass on a record that has none.

        Waits while PENDING_BATCHES micro-batches are pending. Raises the exception of an earlier one (StoreError when
        the store fails, AlreadyCommitted), so that nothing is generated in vain.
        """
        while self.pending and (self.pending[0].done() or len(self.pending) >= self.max_pending):
            with self.watch("write"):
                self.pending.popleft().result()
        if isinstance(item, (Generation, ScoredRecord)):
            future = self.pool.submit(self._process, item)
            self.pending.append(future)
        else:
            future = Future()
            future.set_result(ProcessedRecord(item))
        self.submitted.append(future)
        return future

    def results(self) -> list[ProcessedRecord]:
        """All submitted records in order, once they are stored. Raises a thread's exception, such as StoreError.

        The waiting time is divided between the stages ``metrics`` and ``write`` in proportion to the threads' time.
        """
        with self.watch("write"):
            records = [future.result() for future in self.submitted]
        scoring, storing = sum(record.scoring for record in records), sum(record.storing for record in records)
        share = self.watch.seconds["write"] * scoring / max(scoring + storing, 1e-9)
        self.watch.seconds["write"] -= share
        self.watch.seconds["metrics"] = self.watch.seconds.get("metrics", 0.0) + share
        return records

    def score(self, item: Generation) -> ScoredRecord:
        """Compute the metrics and features of a generation, and prepare its files."""
        began = time.perf_counter()
        numbers, signed_map = measure(
            item.image, item.counterfactual, item.reconstruction, item.lungs, self.config, self.judge
        )
        image_features, counterfactual_features = self.extractor(np.stack([item.image, unit(item.counterfactual)]))
        counterfactual, attribution, reconstruction = (
            f"{kind}/{part(item.planned['shard'])}/{item.planned['record_id']}.png" for kind in FOLDERS
        )
        files: dict[PathColumn, Callable[[], bytes]] = {
            "counterfactual_path": partial(encode_grey, item.counterfactual),
            "reconstruction_path": partial(encode_grey, item.reconstruction),
            "attribution_path": partial(encode_map, signed_map),
        }
        results: Results = {
            **item.results,
            **numbers,
            "counterfactual_path": counterfactual,
            "attribution_path": attribution,
            "reconstruction_path": reconstruction,
            "status": Status.OK.value,
        }
        return ScoredRecord(
            complete(item.planned, results),
            files,
            (image_features, counterfactual_features),
            time.perf_counter() - began,
        )

    def _process(self, item: Generation | ScoredRecord) -> ProcessedRecord:
        scored = self.score(item) if isinstance(item, Generation) else item
        began = time.perf_counter()
        record = scored.record.copy()
        for column, encode in scored.files.items():
            record[column] = self.files.write(record[column], encode())
        return ProcessedRecord(record, scored.features, scored.seconds, time.perf_counter() - began)

    def __enter__(self) -> Postprocessor:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.pool.shutdown(cancel_futures=kind is not None)
