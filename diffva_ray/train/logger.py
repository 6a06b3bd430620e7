"""What a training says of itself while it runs: ``.train/progress.json`` for the driver and ``diffva status``,
TensorBoard always, Weights & Biases and MLflow when asked."""

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

TENSORBOARD = ".train/tensorboard"
SECONDS = 3.0  # between two looks at the training


class TrainingLogger:
    """Of one process; only the first worker writes. ``history`` goes on where an earlier process ended."""

    def __init__(self, recipe: Recipe, store: Store, accelerator: Accelerator, before: tuple[int, int]) -> None:
        self.recipe, self.store, self.accelerator = recipe, store, accelerator
        self.first = accelerator.is_main_process
        self.started, self.said = time.monotonic(), 0.0
        self.history: list[dict[str, Any]] = []
        self.earlier = 0.0  # seconds that processes before this one worked
        self._events: tempfile.TemporaryDirectory[str] | None = None
        if before != (0, 0):
            self._go_on(before)
        if self.first:
            self._start_trackers(self._log_folder())

    def _go_on(self, before: tuple[int, int]) -> None:
        """Keep what was said of steps before the checkpoint that training resumes from."""
        order = {stage.name: n for n, stage in enumerate(self.recipe.train.stages)}
        try:
            about = json.loads(self.store.read(PROGRESS))
        except (OSError, ValueError):
            return
        self.earlier = about["seconds"]
        self.history = [entry for entry in about["history"] if (order[entry["stage"]], entry["step"]) <= before]

    def _log_folder(self) -> Path:
        """TensorBoard's files: in the model folder, or, where that is a bucket, copied there at every checkpoint."""
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
        """Numbers of one step (counted from 1) of a stage; written at most every few seconds, and at a stage's end."""
        self.history.append({"stage": stage, "step": step, **values})
        if not self.first:
            return
        overall = self.steps_before(stage) + step
        self.accelerator.log({f"{stage}/{name}": value for name, value in values.items()}, step=overall)
        if time.monotonic() - self.said > SECONDS or last:
            self.said = time.monotonic()
            self._write(stage, step)

    def image(self, name: str, picture: np.ndarray, stage: str, step: int) -> None:
        """A picture uint8 [H, W, 3] for the trackers that take any."""
        for tracker in self.accelerator.trackers:
            order = {"dataformats": "NHWC"} if isinstance(tracker, TensorBoardTracker) else {}
            if hasattr(tracker, "log_images"):
                tracker.log_images({name: picture[None]}, step=self.steps_before(stage) + step, **order)

    def keep(self) -> None:
        """At a checkpoint: all that was said so far, and TensorBoard's files to where the model is."""
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
        if self.first:
            self.keep()
            for tracker in self.accelerator.trackers:  # accelerator.end_training() would end the process group, too
                tracker.finish()

    def steps_before(self, stage: str) -> int:
        """Steps of the stages before the one named."""
        names = [other.name for other in self.recipe.train.stages]
        return sum(other.steps for other in self.recipe.train.stages[: names.index(stage)])

    def _write(self, stage: str, step: int) -> None:
        stages: Sequence[Any] = self.recipe.train.stages
        about = {
            "stage": stage,
            "step": step,
            "stage_steps": next(other.steps for other in stages if other.name == stage),
            "done": self.steps_before(stage) + step,
            "total": sum(other.steps for other in stages),
            # None before the first ``log_every`` steps, where validation or a checkpoint comes earlier
            "loss": next((entry["loss"] for entry in reversed(self.history) if "loss" in entry), None),
            "seconds": round(self.earlier + time.monotonic() - self.started, 1),
            "history": self.history,
        }
        self.store.put(PROGRESS, json.dumps(about).encode())


def _tracker(name: str, recipe: Recipe, folder: Path) -> Any:
    from accelerate import tracking
    from accelerate.utils import is_mlflow_available, is_wandb_available

    there = {"wandb": is_wandb_available, "mlflow": is_mlflow_available}[name]
    if not there():
        raise RecipeError(f"train.trackers: {name} is not installed; pip install {name}, or leave it out")
    LOG.info("tracking with %s", name)
    if name == "wandb":
        return tracking.WandBTracker("diffva-ray", config=recipe.model_dump(mode="json"))
    return tracking.MLflowTracker(experiment_name="diffva-ray", logging_dir=str(folder))
