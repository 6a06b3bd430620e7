"""Progress of a training on the terminal, read from the model folder, so that it is the same with Ray and without."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from diffva_ray.model.card import PROGRESS
from diffva_ray.progress import Progress
from diffva_ray.storage.store import Store


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
    last = -1
    while not stop.wait(2.0):
        try:
            progress_json = json.loads(store.read(PROGRESS))
        except (OSError, ValueError):
            continue
        if progress_json["done"] == last:
            continue
        last = progress_json["done"]
        if progress is None:
            progress = Progress("training", progress_json["total"], "steps", done=0, interval=10)
            progress.started -= progress_json["seconds"]
        loss = "" if progress_json["loss"] is None else f" loss {progress_json['loss']:.4f}"
        progress.update(last, f"{progress_json['stage']}{loss}")
