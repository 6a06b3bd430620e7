"""What the loop knows of a stage: its networks with an optimizer each (trainables), and their losses. One file per
kind."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from diffva_ray.config.recipe import RecipeError
from diffva_ray.config.stages import Stage as AnyStageConfig
from diffva_ray.config.stages import StageConfig
from diffva_ray.model.bundle import Bundle
from diffva_ray.storage.store import Store
from diffva_ray.train.sampling import ImageSet


@dataclass(frozen=True)
class Batch:
    """A share of one step's global batch. Everything random is drawn for the whole batch, from ``generator``, and then
    restricted to ``rows``: shares of any size, on any number of workers, see the same noise."""

    step: int
    size: int  # images of the global batch
    rows: list[int]
    generator: torch.Generator

    def positions(self) -> list[int]:
        """Where this share stands in the stage's endless sequence of images."""
        return [self.step * self.size + row for row in self.rows]

    def normal(self, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """Standard normal noise [rows, *shape] on the device of ``like``."""
        return torch.randn((self.size, *shape), generator=self.generator)[self.rows].to(like.device)

    def uniform(self, *shape: int) -> torch.Tensor:
        """Uniform numbers [rows, *shape] in [0, 1)."""
        return torch.rand(self.size, *shape, generator=self.generator)[self.rows]


@dataclass
class Trainable:
    """One network with an optimizer of its own. ``loss(network, batch)`` is a mean over the batch's rows; ``network``
    is the trainable's own, wrapped for several workers."""

    name: str
    network: nn.Module
    loss: Callable[[nn.Module, Batch], torch.Tensor]
    learning_rate: float | None = None  # of the stage where None
    shardable: bool = False  # nobody but ``loss`` reads the network while it trains


@dataclass
class StageContext:
    """What a stage is made from."""

    bundle: Bundle
    images: ImageSet
    seed: int
    store: Store  # the model folder
    cache_megabytes: int = 0  # latents kept in memory, at most


@dataclass
class Stage:
    """A stage with nothing in it; kinds override what they have. ``modules`` are kept in checkpoints beside the
    bundle's own networks."""

    context: StageContext
    config: StageConfig
    trainables: list[Trainable] = field(default_factory=list)
    modules: dict[str, nn.Module] = field(default_factory=dict)

    def start(self) -> None:
        """Before the first step of the stage: weights that depend on what earlier stages have trained."""

    def begin(self, device: torch.device, first: bool, wait: Callable[[], None]) -> None:
        """Before the first step of this process: choose what is trainable, prepare data. ``first``: the first worker;
        ``wait``: until all workers have come here."""

    def finish(self, device: torch.device) -> None:
        """After the last step."""

    def export(self, store: Store) -> None:
        """After the last stage, on the first worker: what the bundle does not save by itself."""


KINDS = {
    "autoencoder": "autoencoder:AutoencoderStage",
    "denoiser": "denoiser:DenoiserStage",
    "controlnet": "controlnet:ControlNetStage",
    "judge": "judge:JudgeStage",
    "classifier": "classifier:ClassifierStage",
    "vant-gan": "gan:VantGanStage",
    "ant-gan": "gan:AntGanStage",
}


def make_stage(context: StageContext, config: AnyStageConfig) -> Stage:
    """The stage a recipe describes. Raises RecipeError, UnusableData."""
    if config.trains not in KINDS:
        raise RecipeError(f"train.stages: nothing trains {config.trains!r}; there are {', '.join(KINDS)}")
    module, _, name = KINDS[config.trains].partition(":")
    return getattr(importlib.import_module(f"diffva_ray.train.{module}"), name)(context, config)


def three_channels(images: torch.Tensor) -> torch.Tensor:
    """Grey images [n, H, W] in [0, 1] as the autoencoder wants them: [n, 3, H, W] in [-1, 1]."""
    return (images[:, None] * 2 - 1).expand(-1, 3, -1, -1)
