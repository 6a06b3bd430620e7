"""Interface between the loop and a stage: trainables (networks with an optimizer each), their losses, and hooks. Each
kind of stage has its own file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from diffva_ray.config.stages import StageConfig
from diffva_ray.model.bundle import Bundle
from diffva_ray.storage.store import Store
from diffva_ray.train.sampling import ImageSet, RandomRows

Inputs = dict[str, Any]  # what a loss reads: tensors, on the CPU first and then on the device, and plain values


@dataclass(frozen=True)
class Batch:
    """A share of one step's global batch."""

    step: int  # within the stage, counted from 0
    size: int  # images of the global batch
    rows: list[int]  # indices of this share in the global batch
    generator: torch.Generator  # of the step, on the CPU

    def positions(self) -> list[int]:
        """Return the share's positions in the stage's ``ImageOrder``."""
        return [self.step * self.size + row for row in self.rows]

    @cached_property
    def random(self) -> RandomRows:
        """The random numbers of the share's rows."""
        return RandomRows(self.generator, self.size, self.rows)


@dataclass
class Trainable:
    """One network with its own optimizer.

    ``inputs`` prepares a share on the CPU, in a thread and steps ahead: reads images, draws random numbers. It may read
    neither networks nor the global random generator. ``loss`` is the mean over the rows; it gets the inputs on the
    network's device, and copies nothing between CPU and device, so that the CPU never waits.
    """

    name: str  # for logs
    network: nn.Module
    inputs: Callable[[Batch], Inputs]
    loss: Callable[[nn.Module, Inputs], torch.Tensor]  # called with the network as wrapped for DDP
    learning_rate: float | None = None  # None: the stage's
    shardable: bool = False  # whether only ``loss`` reads the network while it trains


@dataclass(frozen=True)
class Worker:
    """This process among the workers of a training."""

    device: torch.device
    rank: int = 0
    workers: int = 1
    wait: Callable[[], None] = lambda: None  # returns when all workers have called it


@dataclass
class StageContext:
    """Everything that stages are built from."""

    bundle: Bundle  # the model's networks
    images: ImageSet
    seed: int  # of the recipe
    store: Store  # the model folder
    cache_megabytes: int = 0  # memory for each cache of a stage: latents, reconstructions, condition images
    autoencoders: int = 0  # stages that have changed the autoencoder in this process, after which latents are stale
    shared: dict[int, Any] = field(default_factory=dict)  # the latents of image sets, which all stages share


@dataclass
class Stage:
    """Base class of all stages, with hooks that do nothing."""

    context: StageContext
    config: StageConfig
    trainables: list[Trainable] = field(default_factory=list)  # trained in this order in each step
    modules: dict[str, nn.Module] = field(default_factory=dict)  # kept in checkpoints, beside the bundle's networks

    def start(self) -> None:
        """Set weights that depend on earlier stages. Called before the first step, and not again after a resume."""

    def begin(self, worker: Worker) -> None:
        """Choose what is trainable and make the data. Called before the first step of this process."""

    def fill(self, device: torch.device) -> None:
        """Compute with networks that are frozen what the steps read from memory. Called after ``begin``, with the
        precision of the steps."""

    def measures(self, step: int, history: Sequence[Mapping[str, Any]]) -> bool:
        """Whether ``measure`` is due after ``step`` steps, by the entries logged so far. Asked when losses are
        logged."""
        return False

    def measure(self, history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Measure the networks, which have their averaged weights; the numbers are logged with the losses."""
        return {}

    def finished(self, history: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the stage ends before its last step, by the logged entries alone."""
        return False

    def finish(self, device: torch.device) -> None:
        """Finish the networks. Called after the last step, on every worker."""

    def export(self, store: Store) -> None:
        """Write what the bundle does not save itself. Called after the last stage, on the first worker."""


def three_channels(images: torch.Tensor) -> torch.Tensor:
    """Convert grey images [n, H, W] in [0, 1] to the autoencoder's input, [n, 3, H, W] in [-1, 1]."""
    return (images[:, None] * 2 - 1).expand(-1, 3, -1, -1)
