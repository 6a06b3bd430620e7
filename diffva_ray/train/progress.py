"""What a training says on the terminal, read from the model folder: the same for a plain loop and for Ray's workers."""

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
    """While a training writes into the model folder ``store``, say every ten seconds what was last written."""
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
            about = json.loads(store.read(PROGRESS))
        except (OSError, ValueError):
            continue
        if about["done"] == last:
            continue
        last = about["done"]
        if progress is None:
            progress = Progress("training", about["total"], "steps", done=0, interval=10)
            progress.started -= about["seconds"]
        loss = "" if about["loss"] is None else f" loss {about['loss']:.4f}"
        progress.update(last, f"{about['stage']}{loss}")
