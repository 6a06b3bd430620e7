"""The training loop: stages in order, steps whose randomness is their own, checkpoints that resume exactly.

Runs in any process: alone, or as one worker of a Ray Train group (ray_train.py), where Accelerate finds its rank.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from diffva_ray.config import Recipe, RecipeError, StageConfig
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.films import Dataset
from diffva_ray.metrics.validity import save_judge
from diffva_ray.model.bundle import Bundle, build, save
from diffva_ray.model.card import PROGRESS
from diffva_ray.model.training_films import FILM_DIGITS
from diffva_ray.storage import Store, open_store
from diffva_ray.train.checkpoint import Position, load_optimizer, load_weights, read_position, save_checkpoint
from diffva_ray.train.loss import learning_rate
from diffva_ray.train.sampling import FilmSet, step_generator
from diffva_ray.train.stages import AutoencoderStage, DenoiserStage, JudgeStage

Report = Callable[[dict[str, float], Path | None], None]


@dataclass
class Run:
    """What stays the same over all stages of one training."""

    recipe: Recipe
    bundle: Bundle
    films: FilmSet
    accelerator: Accelerator
    store: Store
    fingerprint: str
    report: Report
    started: float
    history: list[dict[str, float | str]]

    @property
    def first(self) -> bool:
        return self.accelerator.is_main_process


def train(
    recipe: Recipe,
    data: str,
    model: str,
    fingerprint: str,
    provenance: dict[str, Any],
    report: Report,
    resume: Path | None = None,
    threads: int | None = None,
) -> None:
    """Train the recipe's stages on ``data`` and write the model folder ``model``.

    ``report(metrics, checkpoint)`` is called on every worker at every checkpoint, with the folder on the first worker
    and None on the others; ``resume`` is such a folder. Raises UnusableData, UnusableModel or RecipeError.
    """
    if threads:
        torch.set_num_threads(threads)
    accelerator = Accelerator(mixed_precision=recipe.train.mixed_precision, cpu=not torch.cuda.is_available())
    bundle = build(recipe)
    dataset: Dataset = open_dataset(data, recipe.data)
    films = FilmSet(dataset, recipe.model.resolution, recipe.train.cache_megabytes)
    run = Run(recipe, bundle, films, accelerator, open_store(model), fingerprint, report, time.monotonic(), [])
    if recipe.train.gradient_checkpointing:
        bundle.unet.enable_gradient_checkpointing()
        bundle.text_encoder.gradient_checkpointing_enable()

    workers = [_stage(run, stage) for stage in recipe.train.stages]
    judge = next((worker.judge for worker in workers if isinstance(worker, JudgeStage)), None)
    extra: dict[str, torch.nn.Module] = {"judge": judge} if judge is not None else {}
    position = Position()
    if resume:
        position = read_position(resume)
        load_weights(resume, bundle, extra)
    for index in range(position.stage, len(workers)):
        start = position.step if index == position.stage else 0
        _run_stage(run, recipe.train.stages[index], workers[index], index, start, resume if start else None, extra)

    if run.first:
        if judge is not None:
            save_judge(judge, run.store)
        unreadable = films.unreadable
        card = {**provenance, "training_fingerprint": fingerprint, "films": len(films.films), "unreadable": unreadable,
                "training_films": [sha256[:FILM_DIGITS] for sha256 in films.sha256()]}  # fmt: skip
        save(bundle, run.store, card)
    accelerator.wait_for_everyone()


def _stage(run: Run, stage: StageConfig) -> AutoencoderStage | DenoiserStage | JudgeStage:
    seed = run.recipe.seed
    if stage.trains == "autoencoder":
        return AutoencoderStage(run.bundle, stage, run.films, seed)
    if stage.trains == "judge":
        torch.manual_seed(seed)
        return JudgeStage(run.bundle, stage, run.films, seed)
    return DenoiserStage(run.bundle, stage, run.films, seed, run.recipe.train.cache_latents)


def _run_stage(
    run: Run,
    stage: StageConfig,
    worker: AutoencoderStage | DenoiserStage | JudgeStage,
    index: int,
    start: int,
    resume: Path | None,
    extra: dict[str, torch.nn.Module],
) -> None:
    accelerator, config = run.accelerator, run.recipe.train
    world = accelerator.num_processes
    if stage.batch_size % world:
        raise RecipeError(f"train.stages.{index}.batch_size {stage.batch_size} does not divide among {world} workers")
    share = stage.batch_size // world
    rows = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)

    for module in run.bundle.modules.values():
        module.to(accelerator.device).requires_grad_(False)
    worker.network.to(accelerator.device)
    worker.set_trainable()
    parameters = [parameter for parameter in worker.network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=stage.learning_rate, betas=stage.betas, weight_decay=stage.weight_decay, fused=True
    )
    ema = EMAModel(parameters, decay=stage.ema_decay, foreach=True) if stage.ema_decay else None
    if resume:
        load_optimizer(resume, optimizer, ema)
        if ema is not None:
            ema.to(accelerator.device)
    worker.network.train()
    network, optimizer = accelerator.prepare(worker.network, optimizer)

    said = time.monotonic()
    for step in range(start, stage.steps):
        torch.manual_seed(
            step_generator(run.recipe.seed, f"{stage.name}/{accelerator.process_index}", step).initial_seed()
        )
        rate = learning_rate(
            step, stage.steps, stage.learning_rate, stage.warmup_steps, stage.schedule, stage.final_lr_fraction
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        positions = range(step * stage.batch_size, (step + 1) * stage.batch_size)
        with accelerator.autocast():
            loss = worker.loss(network, positions, rows, step_generator(run.recipe.seed, stage.name, step))
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(parameters, stage.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.step(parameters)

        done, last = step + 1, step + 1 == stage.steps
        if done % 20 == 0 or last:
            value = float(accelerator.reduce(loss.detach(), "mean"))
            run.history.append(
                {"stage": stage.name, "step": done, "loss": value, "learning_rate": rate, "grad_norm": float(norm)}
            )
            if run.first and (time.monotonic() - said > 3 or last):
                said = time.monotonic()
                _say(run, stage, done)
        if done % config.checkpoint_every == 0 and not last:
            _checkpoint(run, Position(index, done), extra, optimizer, ema)

    if ema is not None:
        ema.copy_to(parameters)
    worker.network.eval()
    worker.finish(accelerator.device)
    _checkpoint(run, Position(index + 1, 0), extra)


def _checkpoint(
    run: Run, position: Position, extra: dict[str, torch.nn.Module], optimizer: Any = None, ema: Any = None
) -> None:
    metrics = {key: value for key, value in run.history[-1].items() if isinstance(value, float)} if run.history else {}
    metrics |= {"stage_index": float(position.stage), "step": float(position.step)}
    if not run.first:
        run.report(metrics, None)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_checkpoint(folder, position, run.fingerprint, run.bundle, extra, optimizer, ema)
        run.report(metrics, folder)


def _say(run: Run, stage: StageConfig, done: int) -> None:
    """Leave the state of affairs in the model folder, where the driver and ``diffva status`` read it."""
    total = sum(stage.steps for stage in run.recipe.train.stages)
    before = 0
    for earlier in run.recipe.train.stages:
        if earlier.name == stage.name:
            break
        before += earlier.steps
    about = {
        "stage": stage.name,
        "step": done,
        "stage_steps": stage.steps,
        "done": before + done,
        "total": total,
        "loss": run.history[-1]["loss"],
        "seconds": round(time.monotonic() - run.started, 1),
        "history": run.history,
    }
    run.store.put(PROGRESS, json.dumps(about).encode())


def keep_checkpoints(folder: Path, keep: int) -> Report:
    """A ``report`` for training without Ray: numbered checkpoints below ``folder``, the newest ``keep`` of them."""
    folder.mkdir(parents=True, exist_ok=True)

    def report(metrics: dict[str, float], checkpoint: Path | None) -> None:
        if checkpoint is None:
            return
        target = folder / f"checkpoint-{int(metrics['stage_index']):02d}-{int(metrics['step']):07d}"
        staging = folder / f".tmp-{target.name}"
        for old in (staging, target):
            _remove(old)
        staging.mkdir()
        for file in checkpoint.iterdir():
            (staging / file.name).write_bytes(file.read_bytes())
        os.replace(staging, target)
        for old in sorted(folder.glob("checkpoint-*"))[:-keep]:
            _remove(old)

    return report


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that ``keep_checkpoints`` finished."""
    found = sorted(folder.glob("checkpoint-*"))
    return found[-1] if found else None


def _remove(folder: Path) -> None:
    if folder.exists():
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
