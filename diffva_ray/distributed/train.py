"""Training on a cluster: Ray Train workers around the loop of ``train/loop.py``, resumed by running it again.

The trainer lives in a task beside the driver: importing it loads torch, and it would answer Ctrl-C by exit code 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.fs
import ray
import ray.train
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from diffva_ray.config.recipe import make_recipe
from diffva_ray.distributed import session
from diffva_ray.distributed.prometheus import TrainingMetrics
from diffva_ray.model.card import UnusableModel
from diffva_ray.storage.store import is_local, open_store
from diffva_ray.train.progress import followed


def fit(
    recipe: dict[str, Any],
    data: str,
    model: str,
    fingerprint: str,
    provenance: dict[str, Any],
    workers: int | tuple[int, int] = 1,
    gpus_per_worker: float | None = None,
    private: bool = False,
) -> None:
    """Train on ``workers`` workers, or on as many between two numbers as the cluster has, and export to ``model``; goes
    on from the last checkpoint in ``model/.train``. The global batch stays the recipe's, whatever the number. Raises
    UnusableModel when checkpoints have been taken away, UnusableCluster for more than a ``private`` cluster has."""
    share = gpus_per_worker
    if share is None:
        share = 1.0 if session.gpus() else 0.0
    threads = max(1, session.cpus() // (workers if isinstance(workers, int) else workers[1]))
    config = {
        "recipe": recipe,
        "data": data,
        "model": model,
        "fingerprint": fingerprint,
        "provenance": provenance,
        "threads": None if share else threads,
    }
    resources: dict[str, float] = {"GPU": share} if share else {"CPU": threads}
    if private:
        least = workers if isinstance(workers, int) else workers[0]
        said = f"--workers {least}" + (f" --gpus-per-worker {share:g}" if share else "")
        session.check_room(said, **{kind: amount * least for kind, amount in resources.items()})
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    settings = {name: value for name, value in session.ENVIRONMENT.items() if name.startswith("RAY_TRAIN_")}
    trainer = _trainer.options(scheduling_strategy=here, runtime_env={"env_vars": settings})
    try:
        with followed(open_store(model)):
            ray.get(trainer.remote(config, workers, resources))
    except ray.exceptions.RayTaskError as error:
        if "CheckpointManagerInitializationError" not in str(error):  # of Ray Train's own, which is not public
            raise
        raise UnusableModel(
            f"{model}/.train/ray: a checkpoint that is listed there is gone; delete that folder to train from the start"
        ) from None


@ray.remote(num_cpus=0, max_retries=0)
def _trainer(config: dict[str, Any], workers: int | tuple[int, int], resources: dict[str, float]) -> None:
    import ray.train.torch

    filesystem, root = _storage(config["model"])
    ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,  # type: ignore[arg-type]  # its annotation lacks the elastic pair
            use_gpu="GPU" in resources,
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=f"{root}/.train",
            storage_filesystem=filesystem,
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=config["recipe"]["train"]["checkpoints_to_keep"],
            ),
            failure_config=ray.train.FailureConfig(max_failures=3),
        ),
    ).fit()


def _worker(config: dict[str, Any]) -> None:
    from diffva_ray.train.loop import train
    from diffva_ray.train.validation import validation_of

    counts = TrainingMetrics(config["model"])

    def report(metrics: dict[str, float], folder: Path | None) -> None:
        if folder is not None:
            counts.checkpoint(metrics)
        checkpoint = ray.train.Checkpoint.from_directory(str(folder)) if folder else None
        ray.train.report(  # the upload runs beside the next steps; half an upload is no checkpoint
            metrics,
            checkpoint=checkpoint,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )

    def run(resume: Path | None) -> None:
        train(
            make_recipe(config["recipe"]),
            config["data"],
            config["model"],
            fingerprint=config["fingerprint"],
            provenance=config["provenance"],
            report=report,
            resume=resume,
            threads=config["threads"],
            validate=validation_of(make_recipe(config["recipe"])),
        )

    latest = ray.train.get_checkpoint()
    if latest is None:
        run(None)
    else:
        with latest.as_directory() as folder:
            run(Path(folder))


def _storage(model: str) -> tuple[pyarrow.fs.FileSystem | None, str]:
    """Where Ray Train keeps its checkpoints: a local path as it is, any other store through its own fsspec file system
    (``fs``), with the same credentials as everything else."""
    store = open_store(model)
    if is_local(model):
        return None, store.uri
    handler = pyarrow.fs.FSSpecHandler(store.fs)  # type: ignore[attr-defined]
    return pyarrow.fs.PyFileSystem(handler), store.uri.partition("://")[2]
