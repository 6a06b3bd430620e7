"""Section 6, training: the product's own step of the joint fine-tune, its parts, and what a checkpoint costs."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from diffva_ray.config.recipe import Recipe, make_recipe
from diffva_ray.config.stages import StageConfig
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.encoding import encode_grey, quantise
from diffva_ray.model.bundle import Bundle
from diffva_ray.storage.local import LocalStore
from diffva_ray.train import loop
from diffva_ray.train.ahead import Ahead, inputs_of
from diffva_ray.train.checkpoint import Position
from diffva_ray.train.kinds import make_stage
from diffva_ray.train.memory import memory_need
from diffva_ray.train.sampling import ImageSet
from diffva_ray.train.saving import Saver
from diffva_ray.train.stage import Stage, StageContext, Worker
from diffva_ray.train.training_step import PreparedTrainable, prepare_trainable, train_step
from gpu_sections.book import Book, Values
from gpu_sections.measure import forget_peak, peak_gib, release, switched, switches, timed
from gpu_sections.subject import Subject, operations_of

PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0}  # dense bf16 TFLOP/s, as the vendor states them


def section(book: Book, subject: Subject) -> None:
    sizes, scratch = subject.sizes, subject.scratch
    side, first = subject.recipe.model.resolution, sizes.training_batches[0]
    credited = operations_of(subject)
    data, large = scratch / "training", scratch / "training-large"

    def prepare() -> Values:
        write_images(subject, data, side, 4 * max(sizes.training_batches))
        write_images(subject, large, sizes.large_side, 4 * first)
        return {"side": side, "large_side": sizes.large_side}

    if book.row("training images", prepare) is None:
        return
    ready: list[Trainer] = []

    def start() -> Values:
        ready.append(Trainer.made(subject, recipe_of(subject), str(data)))
        return {"parameters_that_train": sum(one.numel() for one in ready[0].prepared.parameters)}

    if book.row("trainer", start) is None:
        return
    bundle = ready[0].bundle

    def step(name: str, batch: int, who: Trainer, cached: bool = False, expected: float = 3.0) -> Values | None:
        def work() -> Values:
            forget_peak(subject.device)
            with switched():
                timing = timed(lambda: who.step(batch), subject.device, sizes.calls, most_seconds=5)
                state = switches()
            tflop = batch * (3 * credited["unet"] + (0 if cached else credited["encode"]))
            rate = tflop / timing.seconds
            ceiling = book.value("ceilings", "matrix product, bfloat16", "tflop_per_second")
            peak = next((value for key, value in PEAKS.items() if key in book.found["machine"]["device"]), None)
            return {
                "batch": batch,
                "images_per_second": round(batch / timing.seconds, 2),
                "tflop_per_second_credited": round(rate, 2),
                "mfu_of_datasheet": None if peak is None else round(rate / peak, 3),
                "share_of_measured_matrix_rate": round(rate / ceiling, 3) if ceiling else None,
                **timing.values(),
                "peak_gib": peak_gib(subject.device),
                "switches": state,
            }

        return book.row(f"step, batch {batch}, {name}", work, expected)

    eager(book, subject, ready.pop(), step, str(data), str(large))
    release()
    if subject.tiny and not subject.cuda:
        book.leave_out("compiled step", "toy networks on a CPU: a minute of C++ for a number that nobody wants")
        return

    def start_compiled() -> Values:
        ready.append(Trainer.made(subject, recipe_of(subject, "train.compile=true"), str(data), bundle))
        return {}

    if book.row("trainer, compiled", start_compiled, 20.0) is not None:
        step("compiled", first, ready.pop(), expected=10.0)


def eager(book: Book, subject: Subject, trainer: Trainer, step: Any, data: str, large: str) -> None:
    """Everything that is not compiled, with one optimizer."""
    sizes = subject.sizes
    first, most = sizes.training_batches[0], max(sizes.training_batches)
    for batch in sizes.training_batches:
        step("eager", batch, trainer)
    book.row("memory, as train --dry-run estimates it", lambda: estimate(trainer))
    if subject.cuda:
        book.row("no step waits for the GPU", lambda: no_wait(trainer, first), checked=True)
    else:
        book.leave_out("no step waits for the GPU", "no GPU; tests/unit/train/test_step_transfers.py counts copies")
    trainer.checkpointing(True)
    for batch in dict.fromkeys((first, most)):
        step("eager, gradient checkpointing", batch, trainer)
    trainer.checkpointing(False)
    step("eager, latents cached", first, trainer.with_images(data, cache_latents=1024), cached=True)
    step(f"eager, {sizes.large_side} px images decoded in every step", first, trainer.with_images(large, cache=0))
    book.row("optimizer, clipping and EMA alone", lambda: optimizer_alone(subject, trainer))
    book.row("checkpoint", lambda: checkpoint(trainer), 10.0 if subject.cuda else 0.0)


def write_images(subject: Subject, folder: Path, side: int, count: int) -> None:
    """PNGs of phantoms, moved a little and with noise, since drawing as many phantoms would take too long."""
    store, random = LocalStore(str(folder)), np.random.default_rng(0)
    for n in range(count):
        one = subject.phantoms[n % len(subject.phantoms)].image
        factor = side // len(one)
        image = np.kron(np.roll(one, n, axis=1), np.ones((factor, factor), np.float32))
        image = np.clip(image + random.normal(0, 0.01, image.shape).astype(np.float32), 0, 1)
        store.put(f"Normal/images/{n:04d}.png", encode_grey(quantise(image)))


def recipe_of(subject: Subject, *overrides: str) -> Recipe:
    """The denoiser's stage alone, with EMA."""
    values = subject.recipe.model_dump(mode="json")
    stage = {"name": "joint", "trains": "denoiser", "steps": 1000, "batch_size": subject.sizes.training_batches[0],
             "learning_rate": 1e-5, "classes": {"Normal": 1}, "ema_decay": 0.999}  # fmt: skip
    values["train"] |= {"stages": [stage], "log_every": 1000, "checkpoint_every": 1000, "cache_latents": False}
    return make_recipe(values, overrides)


@dataclass
class Trainer:
    """The loop's own pieces, ready to take single steps, with their inputs made ahead as in the loop."""

    recipe: Recipe
    bundle: Bundle
    accelerator: Accelerator
    stage: Stage
    prepared: PreparedTrainable
    config: StageConfig
    batch: int = 0  # of ``inputs``
    inputs: Any = None  # iterator over steps

    @classmethod
    def made(cls, subject: Subject, recipe: Recipe, data: str, bundle: Bundle | None = None) -> Trainer:
        bundle = bundle or subject.copied()
        accelerator = loop.make_accelerator(recipe)
        stage = stage_of(recipe, bundle, data, 0, 1024)
        for module in bundle.modules.values():
            module.to(subject.device).requires_grad_(False)
        stage.begin(Worker(subject.device))
        config = recipe.train.stages[0]
        prepared = prepare_trainable(recipe.train, accelerator, config, stage.trainables[0])
        return cls(recipe, bundle, accelerator, stage, prepared, config)

    def step(self, batch: int) -> None:
        config = self.config.model_copy(update={"batch_size": batch})
        if batch != self.batch:
            make = inputs_of(self.recipe.seed, config, self.stage.trainables)
            self.batch, self.inputs = batch, iter(Ahead(make, range(10**6), self.accelerator.device))
        step, shares = next(self.inputs)
        train_step(self.accelerator, config, self.prepared, step, shares[0])

    def with_images(self, data: str, cache_latents: int = 0, cache: int = 1024) -> Trainer:
        """The same networks and optimizer on other images: latents kept up to so many megabytes, images as well."""
        stage = stage_of(self.recipe, self.bundle, data, cache_latents, cache)
        with self.accelerator.autocast():
            stage.fill(self.accelerator.device)
        return replace(self, stage=stage, prepared=replace(self.prepared, definition=stage.trainables[0]), batch=0)

    def checkpointing(self, on: bool) -> None:
        unet, encoder = self.bundle.unet, self.bundle.text_encoder
        if on:
            unet.enable_gradient_checkpointing()
            encoder.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            unet.disable_gradient_checkpointing()
            encoder.gradient_checkpointing_disable()


def stage_of(recipe: Recipe, bundle: Bundle, data: str, cache_latents: int, cache: int) -> Stage:
    images = ImageSet(open_dataset(data, recipe.data), recipe.model.resolution, cache)
    store = LocalStore(str(Path(data).parent / "model"))
    return make_stage(StageContext(bundle, images, recipe.seed, store, cache_latents), recipe.train.stages[0])


def estimate(trainer: Trainer) -> Values:
    """To be compared with ``peak_gib`` of the steps with the same batch."""
    found: Values = {}
    for name, checkpointing in (("", False), ("_with_checkpointing", True)):
        need = memory_need(trainer.bundle, [trainer.stage], trainer.recipe.train, 1, checkpointing)
        assert need is not None
        tensors = need.networks + need.optimizer + need.average + need.step
        found |= {"batch": trainer.config.batch_size, f"estimated_gib{name}": round(tensors * 1e9 / 2**30, 2)}
    return found


def no_wait(trainer: Trainer, batch: int) -> Values:
    """PyTorch itself raises an error where a step makes the CPU wait."""
    trainer.step(batch)  # what is copied once
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"waits": 0}


def optimizer_alone(subject: Subject, trainer: Trainer) -> Values:
    """On gradients that lie there already, as after a backward pass."""
    prepared, config = trainer.prepared, trainer.config
    for parameter in prepared.parameters:
        parameter.grad = torch.full_like(parameter, 1e-6)
    parts = {
        "clip": lambda: trainer.accelerator.clip_grad_norm_(prepared.parameters, config.max_grad_norm),
        "optimizer": lambda: prepared.optimizer.step(),
        "ema": lambda: prepared.ema.step(prepared.parameters) if prepared.ema is not None else None,
    }
    found = {}
    with switched():
        for name, part in parts.items():
            found[f"{name}_ms"] = timed(part, subject.device, subject.sizes.calls, most_seconds=3).values()["ms"]
    prepared.optimizer.zero_grad()
    return {**found, "ms": round(sum(found.values()), 3)}


def checkpoint(trainer: Trainer) -> Values:
    """The loop's own checkpoint, on local disk: how long the steps stand still, and when it is written."""
    seen: list[int] = []

    def weigh(_: dict[str, float], folder: Path | None) -> None:
        assert folder is not None
        seen.append(sum(file.stat().st_size for file in folder.iterdir()))
        shutil.rmtree(folder)

    logger: Any = SimpleNamespace(history=[], keep=lambda: None)  # TensorBoard is no part of a checkpoint
    images = trainer.stage.context.images
    with Saver(
        trainer.recipe.train, trainer.bundle, {}, images, trainer.accelerator, "benchmark", weigh, logger, None, {}
    ) as saver:
        began = time.perf_counter()
        saver.save(Position(0, 1), [trainer.prepared])
        copied = time.perf_counter() - began
        saver.finish()
    written = time.perf_counter() - began
    return {"seconds": round(copied, 2), "seconds_until_written": round(written, 2), "bytes": seen[0]}
