"""Training on a cluster: Ray Train workers run the loop of ``train/loop.py``; running it again resumes it.

Ray Train's trainer runs in a task on the driver's node and not in the driver, because its import loads torch, and
because it would end a driver with exit code 0 after Ctrl-C.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import is_local
from diffva_ray.train.progress import followed, read_progress


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
    """Train on the connected cluster and export to ``model``; resumes from the last checkpoint in ``model/.train``.

    Args:
        recipe: The recipe, as a mapping of its sections.
        data: Address of the data set, the same on every node.
        model: Address of the model folder.
        fingerprint: Digest of the training's settings and images.
        provenance: Further entries of the model card.
        workers: Number of workers, or (minimum, maximum) to use as many as the cluster has. The global batch size does
            not depend on it.
        gpus_per_worker: GPUs of each worker; by default 1 if the cluster has GPUs, otherwise 0 (CPU).
        private: Whether the cluster is private, so that resources it lacks are an error.

    Raises:
        UnusableModel: A checkpoint that Ray Train lists was deleted.
        UnusableCluster: A private cluster lacks the resources.
    """
    # Resources of a worker: its GPUs, or an equal share of the CPUs.
    gpus = gpus_per_worker
    if gpus is None:
        gpus = 1.0 if session.gpus() else 0.0
    threads = max(1, session.cpus() // (workers if isinstance(workers, int) else workers[1]))
    config = {
        "recipe": recipe,
        "folder": os.getcwd(),
        "data": data,
        "model": model,
        "fingerprint": fingerprint,
        "provenance": provenance,
        "threads": None if gpus else threads,
    }
    resources: dict[str, float] = {"GPU": gpus} if gpus else {"CPU": threads}
    if private:
        min_workers = workers if isinstance(workers, int) else workers[0]
        options = f"--workers {min_workers}" + (f" --gpus-per-worker {gpus:g}" if gpus else "")
        session.check_resources(options, **{kind: amount * min_workers for kind, amount in resources.items()})

    # Run the trainer on this node.
    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    variables = {name: value for name, value in session.ENVIRONMENT.items() if name.startswith("RAY_TRAIN_")}
    trainer = _trainer.options(scheduling_strategy=this_node, runtime_env={"env_vars": variables})
    try:
        store = open_store(model)
        before = read_progress(store)
        with (
            followed(store),
            session.waiting("the first steps of the training", resources, lambda: read_progress(store) != before),
        ):
            ray.get(trainer.remote(config, workers, resources, private))
    except ray.exceptions.RayTaskError as error:
        if "CheckpointManagerInitializationError" not in str(error):  # an exception of Ray Train that is not public
            raise
        raise UnusableModel(
            f"{model}/.train/ray: a checkpoint listed there is missing; delete that folder to train from the start"
        ) from None


@ray.remote(num_cpus=0, max_retries=0)
def _trainer(
    config: dict[str, Any], workers: int | tuple[int, int], resources: dict[str, float], private: bool
) -> None:
    """Task that runs Ray Train's trainer; on a ``private`` cluster the workers listen on loopback only."""
    import ray.train.torch

    from diffva_ray.distributed.loopback import LoopbackConfig

    filesystem, root = _storage(config["model"])
    ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config=config,
        torch_config=LoopbackConfig() if private else None,
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,  # type: ignore[arg-type]  # the annotation lacks the elastic (minimum, maximum)
            use_gpu="GPU" in resources,
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=f"{root}/.train",
            storage_filesystem=filesystem,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config["recipe"]["train"]["checkpoints_to_keep"]),
            failure_config=ray.train.FailureConfig(max_failures=3),
        ),
    ).fit()


def _worker(config: dict[str, Any]) -> None:
    """Training loop of one worker, from the last checkpoint if there is one."""
    from diffva_ray.train.loop import train
    from diffva_ray.train.validation import validation_of

    with suppress(OSError):  # Ray Train has changed it; relative paths of the recipe (model.base) are the command's
        os.chdir(config["folder"])
    training_metrics = TrainingMetrics(config["model"])

    def report(metrics: dict[str, float], folder: Path | None) -> None:
        if folder is not None:
            training_metrics.checkpoint(metrics)
        checkpoint = ray.train.Checkpoint.from_directory(str(folder)) if folder else None
        ray.train.report(  # uploads during the next steps; an interrupted upload is not a checkpoint
            metrics,
            checkpoint=checkpoint,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )

    recipe = make_recipe(config["recipe"])
    with _sound(ray.train.get_checkpoint()) as resume:
        train(
            recipe,
            config["data"],
            config["model"],
            fingerprint=config["fingerprint"],
            provenance=config["provenance"],
            report=report,
            resume=resume,
            threads=config["threads"],
            validate=validation_of(recipe),
        )


@contextmanager
def _sound(latest: ray.train.Checkpoint | None) -> Iterator[Path | None]:
    """The newest sound checkpoint from ``latest`` backwards as a local folder, None without any checkpoint. Every
    worker finds the same one. Raises UnusableModel if all are damaged."""
    from diffva_ray.train.checkpoint import all_damaged, damage, note_damage

    if latest is None:
        yield None
        return
    folder, filesystem = latest.path.rpartition("/")[0], latest.filesystem
    assert filesystem is not None  # Ray Train fills it in
    infos = filesystem.get_file_info(pyarrow.fs.FileSelector(folder))
    paths = [info.path for info in infos if info.base_name.startswith("checkpoint_")]
    for path in sorted((path for path in paths if path <= latest.path), reverse=True):
        with ray.train.Checkpoint(path, filesystem).as_directory() as local:
            what = damage(Path(local))
            if what is None:
                yield Path(local)
                return
        note_damage(path, what)
    raise all_damaged(folder)


def _storage(model: str) -> tuple[pyarrow.fs.FileSystem | None, str]:
    """File system and path for Ray Train's checkpoints: a local path, or an object store through our own fsspec file
    system (``store.fs``), so that the credentials are the same everywhere."""
    store = open_store(model)
    if is_local(model):
        return None, store.uri
    handler = pyarrow.fs.FSSpecHandler(store.fs)  # type: ignore[attr-defined]
    return pyarrow.fs.PyFileSystem(handler), store.uri.partition("://")[2]
