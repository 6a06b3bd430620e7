"""What becomes of a pair after the networks: it is measured, made into files and stored, in threads beside the work on
the next ones, so that no GPU waits for a PNG or an SSIM."""

from __future__ import annotations

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
from diffva_ray.metrics.features import Extractor
from diffva_ray.metrics.validity import Judge
from diffva_ray.progress import Stopwatch
from diffva_ray.schema import Row, Status
from diffva_ray.storage.store import Store

WORKERS = 4  # pairs that are finished at once
MOST_PENDING = 32  # pairs that wait for that


@dataclass(frozen=True)
class Pair:
    """An image (grey [size, size] in [0, 1]) with its lungs, and on 8 bits what the networks made of it. ``row``: what
    is known of the record so far."""

    row: Row
    image: NDArray[np.float32]
    lungs: NDArray[np.bool_] | None
    counterfactual: NDArray[np.uint8]
    reconstruction: NDArray[np.uint8]


@dataclass(frozen=True)
class Measured:
    """A pair whose numbers are known; ``files`` (path: encoder) are still to be written."""

    row: Row
    files: dict[str, Callable[[], bytes]]
    features: tuple[NDArray[np.float32], NDArray[np.float32]]
    seconds: float


@dataclass(frozen=True)
class Finished:
    """A record's finished row; features of image and counterfactual, and the seconds that measuring and storing took,
    of an ``ok`` one."""

    row: Row
    features: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
    measuring: float = 0.0
    storing: float = 0.0


class Postprocessor:
    """Finishes pairs in threads; whoever commits takes the rows of all of them first (``rows``)."""

    def __init__(
        self, store: Store, watch: Stopwatch, config: GenerateConfig, judge: Judge | None, extractor: Extractor
    ) -> None:
        self.store, self.watch, self.config, self.judge, self.extractor = store, watch, config, judge, extractor
        # a thread starts with all cores for torch, and thread counts change the last bits of features
        self.pool = ThreadPoolExecutor(WORKERS, "finish", torch.set_num_threads, (config.cpu_threads,))
        self.pending: deque[Future[Finished]] = deque()
        self.made: list[Future[Finished]] = []

    def give(self, done: Pair | Measured | Row) -> Future[Finished]:
        """Take over a pair, measured or not, or the row of a record that has none. Waits while MOST_PENDING pairs are
        ahead, and raises what an earlier one raised: nothing is generated for a store that has failed."""
        while self.pending and (self.pending[0].done() or len(self.pending) >= MOST_PENDING):
            with self.watch("write"):
                self.pending.popleft().result()
        if isinstance(done, (Pair, Measured)):
            future = self.pool.submit(self._finish, done)
            self.pending.append(future)
        else:
            future = Future()
            future.set_result(Finished(done))
        self.made.append(future)
        return future

    def rows(self) -> list[Finished]:
        """Everything that was given, in order, once it is stored. Raises what a thread raised, StoreError for one.

        Of the time spent waiting, measuring has its share of the threads' time (stage ``metrics``)."""
        with self.watch("write"):
            made = [future.result() for future in self.made]
        measuring, storing = sum(one.measuring for one in made), sum(one.storing for one in made)
        share = self.watch.seconds["write"] * measuring / max(measuring + storing, 1e-9)
        self.watch.seconds["write"] -= share
        self.watch.seconds["metrics"] = self.watch.seconds.get("metrics", 0.0) + share
        return made

    def measure(self, pair: Pair) -> Measured:
        began = time.perf_counter()
        numbers, signed = measure(
            pair.image, pair.counterfactual, pair.reconstruction, pair.lungs, self.config, self.judge
        )
        image_features, counterfactual_features = self.extractor(np.stack([pair.image, unit(pair.counterfactual)]))
        counterfactual, map_, reconstruction = (
            f"{kind}/{part(pair.row['shard'])}/{pair.row['record_id']}.png" for kind in FOLDERS
        )
        files: dict[str, Callable[[], bytes]] = {
            counterfactual: partial(encode_grey, pair.counterfactual),
            reconstruction: partial(encode_grey, pair.reconstruction),
            map_: partial(encode_map, signed),
        }
        row = {
            **pair.row,
            **numbers,
            "counterfactual_path": counterfactual,
            "attribution_path": map_,
            "reconstruction_path": reconstruction,
            "status": Status.OK.value,
            "error": None,
        }
        return Measured(row, files, (image_features, counterfactual_features), time.perf_counter() - began)

    def _finish(self, done: Pair | Measured) -> Finished:
        measured = self.measure(done) if isinstance(done, Pair) else done
        began = time.perf_counter()
        for path, encode in measured.files.items():
            self.store.put(path, encode())
        return Finished(measured.row, measured.features, measured.seconds, time.perf_counter() - began)

    def __enter__(self) -> Postprocessor:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.pool.shutdown(cancel_futures=kind is not None)
