"""The training loop: runs the stages in order and writes checkpoints from which training resumes exactly.

All randomness of a step follows from (seed, stage, step). The loop runs in a single process or as one worker of a Ray
Train group (``distributed/train.py``), where Accelerate reads the rank from the environment.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.fsdp import FSDPModule

from diffva_ray.config.recipe import Recipe, RecipeError
from diffva_ray.config.stages import StageConfig
from diffva_ray.data.datasets import open_dataset
from diffva_ray.model.bundle import Bundle, build, save
from diffva_ray.model.lora import attach
from diffva_ray.model.training_images import IMAGE_DIGITS
from diffva_ray.progress import LOG
from diffva_ray.provenance import missing
from diffva_ray.storage.foreign_writes import foreign_writes
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import Store
from diffva_ray.train.checkpoint import Position, discard, load_optimizers, load_weights, read_state, save_checkpoint
from diffva_ray.train.classes import fitted
from diffva_ray.train.kinds import make_stage
from diffva_ray.train.logger import TrainingLogger
from diffva_ray.train.loss import learning_rate
from diffva_ray.train.sampling import ImageSet, step_generator
from diffva_ray.train.sharding import gather, like, load_optimizer_state, optimizer_state, sharded, whole
from diffva_ray.train.stage import Batch, Stage, StageContext, Trainable

Report = Callable[[dict[str, float], Path | None], None]  # (metrics, checkpoint folder, which the callee now owns)
Validate = Callable[[Bundle, TrainingLogger, str, int], None]  # (bundle, logger, stage name, step counted from 1)


@dataclass
class TrainingRun:
    """The objects that all stages of one training share."""

    recipe: Recipe
    bundle: Bundle
    accelerator: Accelerator
    modules: dict[str, nn.Module]  # networks of the stages that checkpoints keep beside the bundle's own
    fingerprint: str  # of the training; written into checkpoints
    report: Report
    logger: TrainingLogger
    validate: Validate | None
    scratch: Path | None  # where checkpoints are written first; None: the system's temporary folder

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
    accelerator = Accelerator(mixed_precision=recipe.train.mixed_precision, cpu=not torch.cuda.is_available())
    store = open_store(model)
    bundle, images, stages = prepare(recipe, data, store, accelerator.num_processes)
    recipe = bundle.recipe  # with the classes of the data
    modules = {name: module for stage in stages for name, module in stage.modules.items()}

    # Resume from a checkpoint.
    position = Position()
    if resume:
        state = read_state(resume)
        position = Position(state.stage, state.step)
        load_weights(resume, bundle, modules)
        if state.workers != accelerator.num_processes and accelerator.is_main_process:
            LOG.info(
                "resumed on %d workers instead of %d: images, noise and prompts of every step stay the same; gradient "
                "sums round differently (about 1e-6), and dropout masks, if a network has any, differ",
                accelerator.num_processes,
                state.workers,
            )

    # Run the remaining stages.
    logger = TrainingLogger(recipe, store, accelerator, (position.stage, position.step))
    run = TrainingRun(recipe, bundle, accelerator, modules, fingerprint, report, logger, validate, scratch)
    for index in range(position.stage, len(stages)):
        start = position.step if index == position.stage else 0
        _run_stage(run, stages[index], index, start, resume if start else None)
    logger.close()

    # Write the model; the card comes last and marks the model as complete.
    if run.first:
        for stage in stages:
            stage.export(store)
        card = {
            **provenance,
            "training_fingerprint": fingerprint,
            "images": len(images.images),
            "unreadable": images.unreadable,
            "training_images": [sha256[:IMAGE_DIGITS] for sha256 in images.sha256()],
        }
        save(bundle, store, card)
    accelerator.wait_for_everyone()


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
    images = ImageSet(dataset, recipe.model.resolution, config.cache_megabytes)
    if config.lora is not None:
        attach(bundle.unet, bundle.text_encoder, config.lora, recipe.seed)
    if config.gradient_checkpointing:
        bundle.unet.enable_gradient_checkpointing()
        bundle.text_encoder.gradient_checkpointing_enable({"use_reentrant": False})

    # Build the stages.
    context = StageContext(bundle, images, recipe.seed, store, config.cache_megabytes if config.cache_latents else 0)
    return bundle, images, [make_stage(context, stage) for stage in config.stages]


@dataclass
class PreparedTrainable:
    """A trainable on its device, with optimizer and EMA."""

    definition: Trainable  # as the stage declares it
    network: nn.Module  # what ``loss`` is called with: the definition's network, or its DDP wrapper or sharded copy
    parameters: list[nn.Parameter]  # those that require gradients
    optimizer: Any  # Accelerate's wrapper
    ema: EMAModel | None  # moving average of ``parameters``
    rate: float  # base learning rate, before warm-up and schedule

    def state(self) -> dict[str, Any]:
        """Return optimizer and EMA state, complete on the first worker. Every worker has to call it."""
        average = None
        if self.ema is not None:
            average = self.ema.state_dict()
            average["shadow_params"] = [whole(tensor) for tensor in average["shadow_params"]]
        return {"optimizer": optimizer_state(self.network, self.optimizer.optimizer), "ema": average}

    def gather(self, everywhere: bool = False) -> None:
        """Copy the weights of a sharded network into the definition's network, on the first worker or ``everywhere``.
        Every worker has to call it."""
        if isinstance(self.network, FSDPModule):
            gather(self.network, self.definition.network, everywhere)


def _run_stage(run: TrainingRun, stage: Stage, index: int, start: int, resume: Path | None) -> None:
    """Run one stage from step ``start`` to its end; ``resume`` is the checkpoint with the optimizers' states."""
    accelerator, config = run.accelerator, stage.config
    device, workers, rank = accelerator.device, accelerator.num_processes, accelerator.process_index

    # Split the global batch: this worker's rows, in shares of at most ``micro_batch_size``.
    rows = list(range(rank * config.batch_size // workers, (rank + 1) * config.batch_size // workers))
    size = config.micro_batch_size or len(rows)
    shares = [rows[at : at + size] for at in range(0, len(rows), size)]

    # Freeze everything; the stage then chooses what is trainable.
    for module in run.bundle.modules.values():
        module.to(device).requires_grad_(False)
    if start == 0:
        stage.start()
    stage.begin(device, run.first, accelerator.wait_for_everyone)
    trainables = [_prepare(run, config, trainable) for trainable in stage.trainables]
    if resume:
        _restore(trainables, load_optimizers(resume))

    for step in range(start, config.steps):
        # Dropout draws from the global generator, so it gets a seed for each worker and step.
        torch.manual_seed(step_generator(run.recipe.seed, f"{config.name}/{rank}", step).initial_seed())
        done, last = step + 1, step + 1 == config.steps

        # Train each trainable once, and log at intervals.
        values: dict[str, float] = {}
        for trainable in trainables:
            loss, norm, rate = _train_step(run, config, trainable, step, shares)
            if done % run.recipe.train.log_every == 0 or last:
                name = "" if trainable is trainables[0] else f"{trainable.definition.name}_"
                values |= {
                    f"{name}loss": float(accelerator.reduce(loss, "sum")),
                    f"{name}learning_rate": rate,
                    f"{name}grad_norm": float(whole(norm)),
                }
        if values:
            run.logger.log(config.name, done, values, last)

        # Validate and write a checkpoint at intervals.
        validation = run.recipe.train.validation
        if run.validate is not None and config.trains == "denoiser" and validation.every and (
            done % validation.every == 0 or last
        ):  # fmt: skip
            _validate(run, trainables, config.name, done)
        if done % run.recipe.train.checkpoint_every == 0 and not last:
            _write_checkpoint(run, Position(index, done), trainables)

    # Keep the averaged weights and write the checkpoint from which the next stage starts.
    for trainable in trainables:
        if trainable.ema is not None:
            trainable.ema.copy_to(trainable.parameters)
        trainable.gather(everywhere=True)
        trainable.definition.network.to(device).eval()
    stage.finish(device)
    _write_checkpoint(run, Position(index + 1, 0), [])


def _prepare(run: TrainingRun, config: StageConfig, trainable: Trainable) -> PreparedTrainable:
    """Put the network on its device, sharded or wrapped for several workers, and make its optimizer and EMA."""
    train, accelerator = run.recipe.train, run.accelerator

    # Place the network.
    fsdp = train.sharding == "fsdp" and trainable.shardable and accelerator.num_processes > 1
    if fsdp:
        network = sharded(trainable.network, accelerator.device)
        trainable.network.cpu()
    else:
        network = trainable.network.to(accelerator.device)
    if train.channels_last:
        network = network.to(memory_format=torch.channels_last)
    network.train()

    # The optimizer and the EMA hold the parameters before the network is wrapped.
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    rate = trainable.learning_rate or config.learning_rate
    optimizer = _optimizer(config, parameters, rate)
    ema = EMAModel(parameters, decay=config.ema_decay, foreach=not fsdp) if config.ema_decay else None
    if train.compile:
        network.compile()
    prepared = network if fsdp else accelerator.prepare(network)
    return PreparedTrainable(trainable, prepared, parameters, accelerator.prepare(optimizer), ema, rate)


def _optimizer(config: StageConfig, parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    """AdamW, or its 8-bit version of bitsandbytes. Raises RecipeError if that is not installed."""
    settings: dict[str, Any] = {"lr": rate, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise RecipeError(f"stage {config.name}: {missing('bitsandbytes', 'optimizer adamw8bit', 'bnb')}") from None
    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, **settings)
    return optimizer


def _restore(trainables: list[PreparedTrainable], states: list[dict[str, Any]]) -> None:
    """Load the optimizer and EMA states of a checkpoint."""
    for trainable, state in zip(trainables, states, strict=True):
        load_optimizer_state(trainable.network, trainable.optimizer.optimizer, state["optimizer"])
        if trainable.ema is not None:
            trainable.ema.load_state_dict(state["ema"])
            trainable.ema.shadow_params = list(map(like, trainable.ema.shadow_params, trainable.parameters))


def _train_step(
    run: TrainingRun, config: StageConfig, trainable: PreparedTrainable, step: int, shares: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Train one trainable for one step: add up the gradients of all shares, then call the optimizer. Return this
    worker's part of the mean loss over the global batch, the gradient norm before clipping, and the learning rate."""
    accelerator = run.accelerator
    rate = learning_rate(
        step, config.steps, trainable.rate, config.warmup_steps, config.schedule, config.final_lr_fraction
    )
    for group in trainable.optimizer.param_groups:
        group["lr"] = rate

    # Accumulate gradients over the shares.
    trainable.optimizer.zero_grad()
    total = torch.zeros((), device=accelerator.device)
    for n, rows in enumerate(shares):
        batch = Batch(step, config.batch_size, rows, step_generator(run.recipe.seed, config.name, step))
        weight = len(rows) / config.batch_size
        with _gradient_sync(accelerator, trainable.network, n + 1 < len(shares)):
            with accelerator.autocast():
                loss = trainable.definition.loss(trainable.network, batch)
            accelerator.backward(loss * weight * accelerator.num_processes)  # DDP takes the mean over workers
        total += loss.detach() * weight

    # Update weights and average.
    norm = accelerator.clip_grad_norm_(trainable.parameters, config.max_grad_norm)
    trainable.optimizer.step()
    trainable.optimizer.zero_grad()
    if trainable.ema is not None:
        trainable.ema.step(trainable.parameters)
    return total, norm, rate


def _gradient_sync(accelerator: Accelerator, network: nn.Module, more: bool) -> Any:
    """Context of one backward pass; while ``more`` shares follow, workers do not exchange gradients."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(not more)
        return nullcontext()
    return accelerator.no_sync(network) if more else nullcontext()


def _validate(run: TrainingRun, trainables: list[PreparedTrainable], stage: str, step: int) -> None:
    """Validate on the first worker, with the averaged weights if there are any, while the other workers wait."""
    averaged = [(trainable.ema, trainable.parameters) for trainable in trainables if trainable.ema is not None]
    for ema, parameters in averaged:
        ema.store(parameters)
        ema.copy_to(parameters)
    try:
        for trainable in trainables:
            trainable.gather()
        if run.first and run.validate is not None:
            run.validate(run.bundle, run.logger, stage, step)
    finally:
        for ema, parameters in averaged:
            ema.restore(parameters)
    run.accelerator.wait_for_everyone()


def _write_checkpoint(run: TrainingRun, position: Position, trainables: list[PreparedTrainable]) -> None:
    """Write a checkpoint on the first worker and report it on every worker."""
    newest = run.logger.history[-1] if run.logger.history else {}
    metrics = {key: value for key, value in newest.items() if isinstance(value, float)}
    metrics |= {"stage_index": float(position.stage), "step": float(position.step)}

    # Every worker takes part in gathering shards.
    for trainable in trainables:
        trainable.gather()
    states = [trainable.state() for trainable in trainables]
    if not run.first:
        run.report(metrics, None)
        return

    run.logger.keep()
    with foreign_writes(run.scratch or Path(tempfile.gettempdir()), "a checkpoint"):
        folder = Path(tempfile.mkdtemp(prefix=".tmp-diffva-checkpoint-", dir=run.scratch))
    weights = {name: module.state_dict() for name, module in {**run.bundle.modules, **run.modules}.items()}
    workers = run.accelerator.num_processes
    try:
        save_checkpoint(folder, position, run.fingerprint, workers, run.bundle, weights, states)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    run.report(metrics, folder)
