"""Progress of a training on the terminal, read from the model folder, so that it is the same with Ray and without."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pydantic import BaseModel

from diffva_ray.model.card import PROGRESS
from diffva_ray.progress import Progress
from diffva_ray.storage.store import Store, StoreError


class Logged(BaseModel, extra="allow"):
    """The numbers of one logged step."""

    stage: str
    step: int  # counted from 1


class TrainingProgress(BaseModel):
    """The content of ``progress.json``."""

    stage: str
    step: int
    stage_steps: int
    done: int  # steps of all stages
    total: int
    loss: float | None
    seconds: float
    history: list[Logged]


def read_progress(store: Store) -> TrainingProgress | None:
    """The progress of the training in a model folder; None if there is none, or if its file is damaged."""
    try:
        return TrainingProgress.model_validate_json(store.read(PROGRESS))
    except (OSError, ValueError):
        return None


@contextmanager
def followed(store: Store) -> Iterator[None]:
    """Log the progress in the model folder ``store`` every ten seconds while the block runs."""
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(store, stop), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join(timeout=5)


def _watch(store: Store, stop: threading.Event) -> None:
    progress: Progress | None = None
    now: TrainingProgress | None = None
    last = -1
    while not stop.wait(2.0):
        with suppress(StoreError):
            now = read_progress(store)
        if now is None or now.done == last:
            continue
        last = now.done
        if progress is None:
            progress = Progress("training", now.total, "steps", done=0, interval=10)
            progress.started -= now.seconds
        progress.update(last, now.stage if now.loss is None else f"{now.stage} loss {now.loss:.4f}")
