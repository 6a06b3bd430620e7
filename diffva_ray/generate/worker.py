"""What a worker keeps between shards: run, data, model; and whose turn it is to use the model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.counterfactual.exact_device import is_device_error
from diffva_ray.generate.attempts import GpuFailed, Session
from diffva_ray.generate.compilation import compile_networks
from diffva_ray.generate.keys import check_device_name
from diffva_ray.generate.planned_files import PlannedFiles
from diffva_ray.generate.postprocessing import Postprocessor
from diffva_ray.generate.run import Run, Unfinished, find_run
from diffva_ray.generate.shard_files import ShardFiles
from diffva_ray.metrics.features import Extractor, stand_in
from diffva_ray.metrics.validity import Judge, load_judge
from diffva_ray.model.bundle import load
from diffva_ray.progress import Stopwatch, one_line
from diffva_ray.schema import Results
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import Store


class Turns:
    """Which shards of a worker are in progress: several, of which one generates at a time; or one that runs alone,
    because a worker died on it, so that a further death can be blamed on nothing else."""

    def __init__(self) -> None:
        self.generating = threading.Lock()
        self._changed = threading.Condition()
        self._running = 0  # shards in progress
        self._alone = 0  # shards that run alone, or wait to

    @contextmanager
    def __call__(self, alone: bool) -> Iterator[None]:
        with self._changed:
            self._alone += alone
            self._changed.wait_for(lambda: not (self._running if alone else self._alone))
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._alone -= alone
                self._changed.notify_all()


@dataclass
class WorkerContext:
    """What a worker keeps between shards."""

    run: Run
    data: Store  # where the images are
    engine: CounterfactualEngine  # with the model on its device
    judge: Judge | None  # of the model; None: it has none
    extractor: Extractor = field(default_factory=stand_in)  # whose features the shards store
    session: Session = field(default_factory=Session)  # decides which markers of dead workers count
    turns: Turns = field(default_factory=Turns)
    _files: PlannedFiles | None = None

    @classmethod
    def open(
        cls, run_uri: str, data_uri: str, model_uri: str, device: str | None = None, session: Session | None = None,
        allow_environment_change: bool = False,
    ) -> WorkerContext:  # fmt: skip
        """Load everything a shard needs.

        Raises UnusableModel for a model that cannot be loaded, Unfinished without a run at ``run_uri``, for another
        model than the run's, and for a model that cannot be compiled or has a damaged judge; FingerprintDiffers on
        another device than that of the run's first worker; GpuFailed for a GPU that cannot be used.
        """
        run = find_run(open_store(run_uri))
        if run is None:
            raise Unfinished(f"{run_uri}: no run there")
        bundle = load(model_uri, run.recipe)
        if bundle.digest != run.keys["model_digest"]:
            raise Unfinished(f"--model {model_uri}: not the model that {run_uri} was planned with")
        try:
            engine = CounterfactualEngine(bundle, run.recipe.generate, device)
            check_device_name(run, engine.device_name, allow_environment_change)
            if run.keys["compile"]:
                compile_networks(engine)
        except RuntimeError as error:
            if is_device_error(error):
                raise GpuFailed(f"the GPU cannot be used: {one_line(error, 160)}") from error
            raise
        try:
            judge = load_judge(open_store(model_uri))
        except ValueError as error:
            raise Unfinished(str(error)) from None
        return cls(run, open_store(data_uri), engine, judge, session=session or Session())

    @property
    def files(self) -> PlannedFiles:
        """As ``Run.files``, of the worker's own data set. (Until Python 3.12 a cached property has one lock for the
        whole process, which a paused thread would keep.)"""
        if self._files is None:
            self._files = PlannedFiles.of(self.run.about, self.data)
        return self._files

    @cached_property
    def results(self) -> Results:
        """The results that all records of this worker share."""
        kind = self.run.recipe.generate.map_name
        return {
            "model_digest": self.engine.bundle.digest, "attribution_kind": kind, "device": self.engine.device_name
        }  # fmt: skip

    def postprocessor(self, files: ShardFiles, watch: Stopwatch) -> Postprocessor:
        """A new postprocessor for one attempt at a shard, whose seconds ``watch`` has."""
        return Postprocessor(files, watch, self.run.recipe.generate, self.judge, self.extractor)

    @contextmanager
    def generating(self, watch: Stopwatch) -> Iterator[None]:
        """Wait for the turn to use the engine, whose seconds are added to ``watch``."""
        with self.turns.generating:
            self.engine.watch.seconds = {}
            try:
                yield
            finally:
                watch.add(self.engine.watch.seconds)
