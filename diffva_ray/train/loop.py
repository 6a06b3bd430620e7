"""The training loop: runs the stages in order and writes checkpoints from which training resumes exactly.

All randomness of a step follows from (seed, stage, step). The loop runs in a single process or as one worker of a Ray
Train group (``distributed/train.py``), where Accelerate reads the rank from the environment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from diffva_ray.config.recipe import Recipe, RecipeError
from diffva_ray.counterfactual.exact_device import exact_device
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.mirroring import with_mirror_images
from diffva_ray.model.bundle import Bundle, build, save
from diffva_ray.model.lora import attach
from diffva_ray.progress import LOG
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import Store
from diffva_ray.train.ahead import Ahead, inputs_of
from diffva_ray.train.checkpoint import (
    Position,
    Report,
    discard,
    load_optimizers,
    load_weights,
    read_state,
    tensor_digests,
)
from diffva_ray.train.classes import fitted
from diffva_ray.train.kinds import make_stage
from diffva_ray.train.logger import TrainingLogger
from diffva_ray.train.memory import must_recompute
from diffva_ray.train.sampling import ImageSet, step_generator
from diffva_ray.train.saving import Saver
from diffva_ray.train.sharding import whole
from diffva_ray.train.stage import Stage, StageContext, Worker
from diffva_ray.train.training_step import PreparedTrainable, prepare_trainable, restore, train_step

Validate = Callable[[Bundle, TrainingLogger, str, int], None]  # (bundle, logger, stage name, step counted from 1)


@dataclass
class TrainingRun:
    """The objects that all stages of one training share."""

    recipe: Recipe
    bundle: Bundle
    accelerator: Accelerator
    saver: Saver
    logger: TrainingLogger
    validate: Validate | None

    @property
    def first(self) -> bool:
        return bool(self.accelerator.is_main_process)


def train(
    recipe: Recipe,
    data: str,
    model: str,
    *,
    fingerprint: str,
    provenance: dict[str, Any],
    report: Report = discard,
    resume: Path | None = None,
    threads: int | None = None,
    validate: Validate | None = None,
    scratch: Path | None = None,
) -> None:
    """Train the recipe's stages on ``data`` and write the model folder ``model``.

    Args:
        recipe: Recipe whose ``train.stages`` are trained in order.
        data: Data set (folder, manifest or object store address) with the training images.
        model: Model folder to write; also holds ``.train/progress.json`` and the TensorBoard files.
        fingerprint: Digest of the training's settings and images, for checkpoints and the model card.
        provenance: Further entries of the model card.
        report: Called as ``report(metrics, checkpoint)`` on every worker at every checkpoint. ``checkpoint`` is a
            folder that ``report`` has to move or delete, on the first worker, and None on the others. The default
            deletes all checkpoints.
        resume: Checkpoint folder to resume from.
        threads: CPU threads of PyTorch; None leaves its default.
        validate: Called on the first worker every ``train.validation.every`` steps, and after the last step, of each
            denoiser stage.
        scratch: Folder in which checkpoints are written before ``report`` gets them; None: the system's temporary one.

    Raises:
        StoreError: A checkpoint or the model cannot be written.
        UnusableData: The data set cannot be read or lacks a class.
        UnusableModel: The base model or the checkpoint does not fit the recipe.
        RecipeError: The recipe asks for something that cannot be built.
    """
    # Build everything, so that a recipe that cannot work fails before the first step.
    if threads:
        torch.set_num_threads(threads)
    if torch.cuda.is_available():
        exact_device()
    accelerator = make_accelerator(recipe)
    store = open_store(model)
    bundle, images, stages = prepare(recipe, data, store, accelerator.num_processes)
    recipe = bundle.recipe  # with the classes of the data
    modules = {name: module for stage in stages for name, module in stage.modules.items()}

    # Remember the base model's weights, which checkpoints leave out.
    first = accelerator.is_main_process
    base = {name: tensor_digests(module.state_dict()) for name, module in bundle.modules.items() if first}

    # Resume from a checkpoint.
    position, trained_on = Position(), set[str]()
    if resume:
        state = read_state(resume)
        position, trained_on = Position(state.stage, state.step), set(state.images)
        load_weights(resume, bundle, modules)
        if state.scaler and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state.scaler)
        if state.workers != accelerator.num_processes and accelerator.is_main_process:
            LOG.info(
                "resumed on %d workers instead of %d: images, noise and prompts of every step stay the same; gradient "
                "sums round differently (about 1e-6), and dropout masks, if a network has any, differ",
                accelerator.num_processes,
                state.workers,
            )

    # Run the remaining stages.
    logger = TrainingLogger(recipe, store, accelerator, (position.stage, position.step))
    with Saver(
        recipe.train, bundle, modules, images, accelerator, fingerprint, report, logger, scratch, base, trained_on
    ) as saver:
        run = TrainingRun(recipe, bundle, accelerator, saver, logger, validate)
        for index in range(position.stage, len(stages)):
            start = position.step if index == position.stage else 0
            _run_stage(run, stages[index], index, start, resume if start else None)
    logger.close()
    training_images = saver.digests()

    # Write the model; the card comes last and marks the model as complete.
    if run.first:
        for stage in stages:
            stage.export(store)
        card = {
            **provenance,
            "training_fingerprint": fingerprint,
            "images": len(images.images),
            "unreadable": images.unreadable,
            "training_images": training_images,
        }
        save(bundle, store, card)
    accelerator.wait_for_everyone()


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Accelerate for this process, on a GPU if there is one. Gradients lie in DDP's buckets, not beside them."""
    buckets = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    return Accelerator(
        mixed_precision=recipe.train.mixed_precision, cpu=not torch.cuda.is_available(), kwargs_handlers=[buckets]
    )


def prepare(recipe: Recipe, data: str, store: Store, workers: int = 1) -> tuple[Bundle, ImageSet, list[Stage]]:
    """Build the model, open the images and build all stages, with the classes of the data. Raises UnusableData,
    UnusableModel and RecipeError for what cannot be trained on ``workers`` workers."""
    dataset = open_dataset(data, recipe.data)
    recipe = fitted(recipe, dataset)
    config = recipe.train
    for index, stage in enumerate(config.stages):
        if stage.batch_size < workers:
            raise RecipeError(
                f"train.stages.{index}.batch_size {stage.batch_size} leaves some of {workers} workers idle"
            )

    # Build the model and load the data.
    bundle = build(recipe)
    dataset = with_mirror_images(dataset) if config.mirror else dataset
    images = ImageSet(dataset, recipe.model.resolution, config.cache_megabytes)
    if config.lora is not None:
        attach(bundle.unet, bundle.text_encoder, config.lora, recipe.seed)

    # Build the stages.
    context = StageContext(bundle, images, recipe.seed, store, config.cache_megabytes if config.cache_latents else 0)
    stages = [make_stage(context, stage) for stage in config.stages]
    if must_recompute(bundle, stages, config, workers):
        bundle.unet.enable_gradient_checkpointing()
        bundle.text_encoder.gradient_checkpointing_enable({"use_reentrant": False})
    return bundle, images, stages


def _run_stage(run: TrainingRun, stage: Stage, index: int, start: int, resume: Path | None) -> None:
    """Run one stage from step ``start`` to its end; ``resume`` is the checkpoint with the optimizers' states."""
    accelerator, config, train, saver = run.accelerator, stage.config, run.recipe.train, run.saver
    device, rank = accelerator.device, accelerator.process_index

    # Freeze everything; the stage then chooses what is trainable.
    for module in run.bundle.modules.values():
        module.to(device).requires_grad_(False)
    if start == 0:
        stage.start()
    stage.begin(Worker(device, rank, accelerator.num_processes, accelerator.wait_for_everyone))
    with accelerator.autocast():
        stage.fill(device)
    trainables = [prepare_trainable(train, accelerator, config, trainable) for trainable in stage.trainables]
    if resume:
        restore(trainables, load_optimizers(resume))

    make = inputs_of(run.recipe.seed, config, stage.trainables, rank, accelerator.num_processes)
    with Ahead(make, range(start, config.steps), device) as ahead:
        for step, inputs in ahead:
            # Dropout draws from the global generator, so it gets a seed for each worker and step.
            torch.manual_seed(step_generator(run.recipe.seed, f"{config.name}/{rank}", step).initial_seed())
            done, last = step + 1, step + 1 == config.steps
            results = [
                train_step(accelerator, config, trainable, step, shares)
                for trainable, shares in zip(trainables, inputs, strict=True)
            ]

            # Log at intervals, at which the CPU waits for the device and all workers hear from the first one.
            due = train.checkpoint_every is not None and done % train.checkpoint_every == 0
            if done % train.log_every == 0 or last:
                values, (time_has_come, written) = _fetched(run, trainables, results)
                if stage.measures(done, run.logger.history):
                    values |= _measured(run, stage, trainables)
                run.logger.log(config.name, done, values, last)
                due = due or time_has_come
                if written:
                    saver.finish()

            # Validate and write a checkpoint at intervals.
            validation = train.validation
            if run.validate is not None and config.trains == "denoiser" and validation.every and (
                done % validation.every == 0 or last
            ):  # fmt: skip
                _validate(run, trainables, config.name, done)
            if due and not last:
                saver.save(Position(index, done), trainables)
            if stage.finished(run.logger.history):
                break

    # Keep the averaged weights and write the checkpoint from which the next stage starts.
    for trainable in trainables:
        if trainable.ema is not None:
            trainable.ema.copy_to(trainable.parameters)
        trainable.gather(everywhere=True)
        trainable.definition.network.to(device).eval()
    stage.finish(device)
    saver.save(Position(index + 1, 0), [])
    saver.finish()


def _fetched(
    run: TrainingRun, trainables: list[PreparedTrainable], results: list[tuple[torch.Tensor, torch.Tensor, float]]
) -> tuple[dict[str, float], list[bool]]:
    """Fetch the numbers of a step from the device, summed over the workers, with the first worker's signals."""
    signals = torch.tensor(run.saver.signals(), device=run.accelerator.device)
    local = torch.cat([torch.stack([loss.float() for loss, _, _ in results]), signals])
    *losses, due, written = run.accelerator.reduce(local, "sum").tolist()
    values: dict[str, float] = {}
    for trainable, loss, (_, norm, rate) in zip(trainables, losses, results, strict=True):
        name = "" if trainable is trainables[0] else f"{trainable.definition.name}_"
        values |= {f"{name}loss": loss, f"{name}learning_rate": rate, f"{name}grad_norm": float(whole(norm))}
    return values, [due > 0, written > 0]


def _measured(run: TrainingRun, stage: Stage, trainables: list[PreparedTrainable]) -> dict[str, float]:
    """The stage's own measurements as the mean over the workers, who all have to agree on what follows from them."""
    with _averaged(trainables):
        local = stage.measure(run.logger.history)
    values = torch.tensor(list(local.values()), device=run.accelerator.device)
    return dict(zip(local, run.accelerator.reduce(values, "mean").tolist(), strict=True))


def _validate(run: TrainingRun, trainables: list[PreparedTrainable], stage: str, step: int) -> None:
    """Validate on the first worker, with the averaged weights if there are any, while the other workers wait."""
    with _averaged(trainables):
        if run.first and run.validate is not None:
            run.validate(run.bundle, run.logger, stage, step)
    run.accelerator.wait_for_everyone()


@contextmanager
def _averaged(trainables: list[PreparedTrainable]) -> Iterator[None]:
    """Let the networks have their averaged weights, where there are any, while the block runs."""
    averaged = [(trainable.ema, trainable.parameters) for trainable in trainables if trainable.ema is not None]
    for ema, parameters in averaged:
        ema.store(parameters)
        ema.copy_to(parameters)
    try:
        for trainable in trainables:
            trainable.gather()
        yield
    finally:
        for ema, parameters in averaged:
            ema.restore(parameters)
