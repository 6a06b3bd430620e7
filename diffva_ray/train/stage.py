"""Interface between the loop and a stage: trainables (networks with an optimizer each), their losses, and hooks. Each
kind of stage has its own file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from diffva_ray.config.stages import StageConfig
from diffva_ray.model.bundle import Bundle
from diffva_ray.storage.store import Store
from diffva_ray.train.sampling import ImageSet


@dataclass(frozen=True)
class Batch:
    """A share of one step's global batch. Random numbers are drawn for the whole batch and then restricted to ``rows``,
    so that shares of any size, on any number of workers, get the same noise."""

    step: int  # within the stage, counted from 0
    size: int  # images of the global batch
    rows: list[int]  # indices of this share in the global batch
    generator: torch.Generator  # of the step, on the CPU

    def positions(self) -> list[int]:
        """Return the share's positions in the stage's ``ImageOrder``."""
        return [self.step * self.size + row for row in self.rows]

    def normal(self, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """Return standard normal noise [rows, *shape] on the device of ``like``."""
        return torch.randn((self.size, *shape), generator=self.generator)[self.rows].to(like.device)

    def uniform(self, *shape: int) -> torch.Tensor:
        """Return uniform numbers [rows, *shape] in [0, 1)."""
        return torch.rand(self.size, *shape, generator=self.generator)[self.rows]


@dataclass
class Trainable:
    """One network with its own optimizer."""

    name: str  # for logs
    network: nn.Module
    loss: Callable[[nn.Module, Batch], torch.Tensor]  # mean over the rows; called with the network as wrapped for DDP
    learning_rate: float | None = None  # None: the stage's
    shardable: bool = False  # whether only ``loss`` reads the network while it trains


@dataclass
class StageContext:
    """Everything that stages are built from."""

    bundle: Bundle  # the model's networks
    images: ImageSet
    seed: int  # of the recipe
    store: Store  # the model folder
    cache_megabytes: int = 0  # memory for each cache of a stage: latents, reconstructions, condition images


@dataclass
class Stage:
    """Base class of all stages, with hooks that do nothing."""

    context: StageContext
    config: StageConfig
    trainables: list[Trainable] = field(default_factory=list)  # trained in this order in each step
    modules: dict[str, nn.Module] = field(default_factory=dict)  # kept in checkpoints, beside the bundle's networks

    def start(self) -> None:
        """Set weights that depend on earlier stages. Called before the first step, and not again after a resume."""

    def begin(self, device: torch.device, first: bool, wait: Callable[[], None]) -> None:
        """Choose what is trainable and prepare data. Called before the first step of this process. ``first`` is true on
        the first worker; ``wait()`` returns when all workers have called it."""

    def finish(self, device: torch.device) -> None:
        """Finish the networks. Called after the last step, on every worker."""

    def export(self, store: Store) -> None:
        """Write what the bundle does not save itself. Called after the last stage, on the first worker."""


def three_channels(images: torch.Tensor) -> torch.Tensor:
    """Convert grey images [n, H, W] in [0, 1] to the autoencoder's input, [n, 3, H, W] in [-1, 1]."""
    return (images[:, None] * 2 - 1).expand(-1, 3, -1, -1)
