"""Logging of a running training: ``.train/progress.json`` for the driver and ``diffva status``, TensorBoard always, and
Weights & Biases or MLflow if the recipe names them."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker

from diffva_ray.config.recipe import Recipe, RecipeError
from diffva_ray.model.card import PROGRESS
from diffva_ray.progress import LOG
from diffva_ray.storage.store import Store, is_local
from diffva_ray.train.progress import read_progress

TENSORBOARD = ".train/tensorboard"
WRITE_INTERVAL = 3.0  # seconds between two writes of progress.json


class TrainingLogger:
    """Logger of one process; only the first worker writes.

    ``history`` holds the logged numbers of all steps. When training resumes, it starts with the entries of the earlier
    process, up to the position ``before`` (stage index, step).
    """

    def __init__(self, recipe: Recipe, store: Store, accelerator: Accelerator, before: tuple[int, int]) -> None:
        self.recipe, self.store, self.accelerator = recipe, store, accelerator
        self.first = accelerator.is_main_process
        self.started, self.written = time.monotonic(), 0.0
        self.history: list[dict[str, Any]] = []
        self.earlier = 0.0  # seconds of training in earlier processes
        self._events: tempfile.TemporaryDirectory[str] | None = None
        if before != (0, 0):
            self._restore(before)
        if self.first:
            self._start_trackers(self._log_folder())

    def _restore(self, before: tuple[int, int]) -> None:
        """Restore the history up to the checkpoint from which training resumes."""
        order = {stage.name: n for n, stage in enumerate(self.recipe.train.stages)}
        progress = read_progress(self.store)
        if progress is None:
            return
        self.earlier = progress.seconds
        self.history = [
            entry.model_dump()
            for entry in progress.history
            if entry.stage in order and (order[entry.stage], entry.step) <= before
        ]

    def _log_folder(self) -> Path:
        """Folder for TensorBoard's files: in the model folder, or, if that is in an object store, a temporary folder
        that is copied there at every checkpoint."""
        if is_local(self.store.uri):
            return Path(self.store.uri) / TENSORBOARD
        self._events = tempfile.TemporaryDirectory()
        return Path(self._events.name)

    def _start_trackers(self, folder: Path) -> None:
        self.accelerator.trackers = [TensorBoardTracker(str(int(time.time())), folder)]
        for name in self.recipe.train.trackers:
            self.accelerator.trackers.append(_tracker(name, self.recipe, folder))
        for tracker in self.accelerator.trackers:
            tracker.start()

    def log(self, stage: str, step: int, values: dict[str, float], last: bool) -> None:
        """Log the numbers of one step (counted from 1) of a stage. The ``last`` step of a stage is written at once,
        others at most every few seconds."""
        self.history.append({"stage": stage, "step": step, **values})
        if not self.first:
            return
        overall = self.steps_before(stage) + step
        self.accelerator.log({f"{stage}/{name}": value for name, value in values.items()}, step=overall)
        if time.monotonic() - self.written > WRITE_INTERVAL or last:
            self.written = time.monotonic()
            self._write(stage, step)

    def image(self, name: str, pixels: np.ndarray, stage: str, step: int) -> None:
        """Log an image, uint8 [H, W, 3], to the trackers that support images."""
        for tracker in self.accelerator.trackers:
            options = {"dataformats": "NHWC"} if isinstance(tracker, TensorBoardTracker) else {}
            if hasattr(tracker, "log_images"):
                tracker.log_images({name: pixels[None]}, step=self.steps_before(stage) + step, **options)

    def keep(self) -> None:
        """Write the whole history, and copy TensorBoard's files to the model folder. Called at every checkpoint."""
        if self.history:
            self._write(self.history[-1]["stage"], self.history[-1]["step"])
        if self._events is None:
            return
        root = Path(self._events.name)
        for tracker in self.accelerator.trackers:
            if isinstance(tracker, TensorBoardTracker):
                tracker.writer.flush()
        for file in root.rglob("events.*"):
            self.store.put(f"{TENSORBOARD}/{file.relative_to(root).as_posix()}", file.read_bytes())

    def close(self) -> None:
        """Write everything and close the trackers."""
        if self.first:
            self.keep()
            for tracker in self.accelerator.trackers:  # accelerator.end_training() would also end the process group
                tracker.finish()

    def steps_before(self, stage: str) -> int:
        """Number of steps of all stages before ``stage``."""
        names = [other.name for other in self.recipe.train.stages]
        return sum(other.steps for other in self.recipe.train.stages[: names.index(stage)])

    def _write(self, stage: str, step: int) -> None:
        stages: Sequence[Any] = self.recipe.train.stages
        progress = {
            "stage": stage,
            "step": step,
            "stage_steps": next(other.steps for other in stages if other.name == stage),
            "done": self.steps_before(stage) + step,
            "total": sum(other.steps for other in stages),
            # None when validation or a checkpoint comes before the first ``log_every`` steps
            "loss": next((entry["loss"] for entry in reversed(self.history) if "loss" in entry), None),
            "seconds": round(self.earlier + time.monotonic() - self.started, 1),
            "history": self.history,
        }
        self.store.put(PROGRESS, json.dumps(progress).encode())


def _tracker(name: str, recipe: Recipe, folder: Path) -> Any:
    """The tracker called ``name``: wandb or mlflow."""
    from accelerate import tracking
    from accelerate.utils import is_mlflow_available, is_wandb_available

    is_available = {"wandb": is_wandb_available, "mlflow": is_mlflow_available}[name]
    if not is_available():
        raise RecipeError(f"train.trackers: {name} is not installed; pip install {name}, or remove it from the recipe")
    LOG.info("tracking with %s", name)
    if name == "wandb":
        return tracking.WandBTracker("diffva-ray", config=recipe.model_dump(mode="json"))
    return tracking.MLflowTracker(experiment_name="diffva-ray", logging_dir=str(folder))
