"""Training on a cluster: Ray Train workers around the loop of ``train/loop.py``, resumed by running it again."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray.train
import ray.train.torch

from diffva_ray import ray_cluster
from diffva_ray.config import make_recipe
from diffva_ray.observe import Progress
from diffva_ray.storage import Store, open_store
from diffva_ray.train.loop import PROGRESS, train


def fit(
    recipe: dict[str, Any],
    data: str,
    model: str,
    fingerprint: str,
    provenance: dict[str, Any],
    workers: int = 1,
    gpus_per_worker: float | None = None,
) -> None:
    """Train on ``workers`` workers and export to ``model``; goes on from the last checkpoint in ``model/.train``."""
    share = gpus_per_worker if gpus_per_worker is not None else (1.0 if ray_cluster.gpus() else 0.0)
    threads = max(1, ray_cluster.cpus() // workers)
    filesystem, root = _storage(model)
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={
            "recipe": recipe,
            "data": data,
            "model": model,
            "fingerprint": fingerprint,
            "provenance": provenance,
            "threads": None if share else threads,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            use_gpu=share > 0,
            resources_per_worker={"GPU": share} if share else {"CPU": threads},
        ),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=f"{root}/.train",
            storage_filesystem=filesystem,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=recipe["train"]["checkpoints_to_keep"]),
            failure_config=ray.train.FailureConfig(max_failures=3),
        ),
    )
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(open_store(model), stop), daemon=True)
    watcher.start()
    try:
        trainer.fit()
    finally:
        stop.set()
        watcher.join(timeout=5)


def _worker(config: dict[str, Any]) -> None:
    def report(metrics: dict[str, float], folder: Path | None) -> None:
        checkpoint = ray.train.Checkpoint.from_directory(str(folder)) if folder else None
        ray.train.report(metrics, checkpoint=checkpoint)

    def run(resume: Path | None) -> None:
        train(
            make_recipe(config["recipe"]),
            config["data"],
            config["model"],
            config["fingerprint"],
            config["provenance"],
            report,
            resume,
            config["threads"],
        )

    latest = ray.train.get_checkpoint()
    if latest is None:
        run(None)
    else:
        with latest.as_directory() as folder:
            run(Path(folder))


def _storage(model: str) -> tuple[pyarrow.fs.FileSystem | None, str]:
    """Where Ray Train keeps its checkpoints: a local path as it is, S3 through s3fs with the same credentials chain as
    everything else."""
    store = open_store(model)
    if not model.startswith("s3://"):
        return None, store.uri
    handler = pyarrow.fs.FSSpecHandler(store.fs)  # type: ignore[attr-defined]
    return pyarrow.fs.PyFileSystem(handler), store.uri.removeprefix("s3://")


def _watch(store: Store, stop: threading.Event) -> None:
    """Say what the first worker last wrote into the model folder: progress comes from storage."""
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
        progress.update(last, f"{about['stage']} loss {about['loss']:.4f}")
