"""GPU memory that a training needs, estimated without a GPU: parameters are counted, and the activations of a step are
followed through a forward and a backward pass of tensors without content."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffva_ray.config.training import TrainConfig
from diffva_ray.model.bundle import Bundle
from diffva_ray.progress import LOG
from diffva_ray.train.denoiser import DenoiserStage
from diffva_ray.train.stage import Stage

GPUS = {  # GB, by GPU and AWS's instances with it
    "T4 (g4dn)": 16, "A10G (g5)": 24, "L4 (g6)": 24, "A100 (p4d)": 40, "L40S (g6e)": 48, "A100 (p4de)": 80,
    "H100 (p5)": 80, "H200 (p5en)": 141,
}  # fmt: skip
RESERVED = 2.0  # GB: CUDA's context, libraries' workspaces
FRAGMENTED = 1.1  # memory that PyTorch's allocator takes, to what tensors need


@dataclass(frozen=True)
class MemoryNeed:
    """GB of one worker's GPU at the stage that needs most."""

    stage: str
    networks: float  # weights of all networks
    optimizer: float
    average: float  # EMA
    step: float  # activations and gradients, at most at once
    checkpointing: bool  # whether activations are recomputed

    @property
    def total(self) -> float:
        tensors = self.networks + self.optimizer + self.average + self.step
        return FRAGMENTED * tensors + RESERVED

    def said(self) -> str:
        """The estimate in one line."""
        fits = [name for name, size in GPUS.items() if self.total <= size]
        small = [name for name in GPUS if name not in fits]
        recomputed = " with gradient checkpointing" if self.checkpointing else ""
        return (
            f"about {self.total:.1f} GB a worker in stage {self.stage} (networks {self.networks:.1f}, optimizer "
            f"{self.optimizer:.1f}, average {self.average:.1f}, activations and gradients {self.step:.1f}"
            f"{recomputed}): "
            + (f"too much for {', '.join(small)}; " if small else "")
            + (f"fits {fits[0]} and larger" if fits else "take more workers, micro_batch_size or sharding: fsdp")
        )


def memory_lines(bundle: Bundle, stages: Sequence[Stage], train: TrainConfig, workers: int) -> list[str]:
    """What a training needs, in a line; with ``gradient_checkpointing: auto`` also without recomputed activations."""
    ways = {True: (True,), False: (False,), "auto": (False, True)}[train.gradient_checkpointing]
    needs = [memory_need(bundle, stages, train, workers, checkpointing) for checkpointing in ways]
    return [need.said() for need in needs if need is not None]


def must_recompute(bundle: Bundle, stages: Sequence[Stage], train: TrainConfig, workers: int) -> bool:
    """Whether ``gradient_checkpointing`` is on, or ``auto`` and this GPU is too small without it."""
    if train.gradient_checkpointing != "auto" or not torch.cuda.is_available():
        return train.gradient_checkpointing is True
    need = memory_need(bundle, stages, train, workers, False)
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 1e9
    if need is None or need.total <= size:
        return False
    LOG.info("activations are recomputed: without, a step needs about %.0f GB of %.0f GB", need.total, size)
    return True


def memory_need(
    bundle: Bundle, stages: Sequence[Stage], train: TrainConfig, workers: int, checkpointing: bool
) -> MemoryNeed | None:
    """The need of the denoiser stage that needs most; None without such a stage."""
    denoisers = [stage for stage in stages if isinstance(stage, DenoiserStage)]
    if not denoisers:
        return None
    largest = max(denoisers, key=lambda stage: (_count(stage), _rows(stage, workers), bool(stage.config.ema_decay)))
    return _need(bundle, largest, train, workers, checkpointing)


def _count(stage: DenoiserStage) -> int:
    """Number of trained weights."""
    return sum(parameter.numel() for parameter in stage.trained_parameters())


def _rows(stage: DenoiserStage, workers: int) -> int:
    """Images of a forward pass."""
    config = stage.config
    rows = min(-(-config.batch_size // workers), config.micro_batch_size or config.batch_size)
    return rows * (2 if config.prior_class else 1)


def _need(bundle: Bundle, stage: DenoiserStage, train: TrainConfig, workers: int, checkpointing: bool) -> MemoryNeed:
    config = stage.config
    trained = {id(parameter) for parameter in stage.trained_parameters()}
    split = workers if train.sharding == "fsdp" else 1
    count = _count(stage) / split
    networks = sum(value.nbytes for module in bundle.modules.values() for value in module.state_dict().values())
    rows = _rows(stage, workers)
    return MemoryNeed(
        stage=config.name,
        networks=networks / split / 1e9,
        optimizer=count * (2 if config.optimizer == "adamw8bit" else 8) / 1e9,
        average=count * 4 / 1e9 if config.ema_decay else 0.0,
        step=_step_bytes(stage.trainables[0].network, trained, bundle, rows, train, checkpointing, workers > 1) / 1e9,
        checkpointing=checkpointing,
    )


class _Peak(TorchDispatchMode):
    """Follows the bytes of all tensors that computations make, from their making to their end."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.alive = dict.fromkeys((tensor.untyped_storage()._cdata for tensor in known), 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._ended, storage._cdata)
        return output

    def _ended(self, storage: int) -> None:
        self.now -= self.alive.pop(storage, 0)


def _step_bytes(
    network: nn.Module, trained: set[int], bundle: Bundle, rows: int, train: TrainConfig, checkpointing: bool,
    exchanged: bool,
) -> int:  # fmt: skip
    """Peak bytes of one forward and backward pass beside weights and optimizer; ``exchanged`` gradients lie in buckets
    that stay."""
    names = {name for name, parameter in network.named_parameters() if id(parameter) in trained}
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(fake):
        copied: Any = copy.deepcopy(network).train()
    switch = copied.unet.enable_gradient_checkpointing if checkpointing else copied.unet.disable_gradient_checkpointing
    switch()
    if checkpointing:
        copied.text_encoder.gradient_checkpointing_enable({"use_reentrant": False})
    gradients = 0
    for name, parameter in copied.named_parameters():
        parameter.requires_grad_(name in names)
        gradients += parameter.nbytes if name in names else 0
    side = bundle.recipe.model.resolution // bundle.latent_scale
    prompts = min(rows, len(bundle.recipe.data.prompts) + 1)
    device = next(network.parameters()).device
    half = torch.autocast(device.type, torch.bfloat16, enabled=train.mixed_precision != "no")
    with fake, device, _Peak(copied.parameters()) as peak, half:
        tokens = torch.ones(prompts, bundle.tokenizer.model_max_length, dtype=torch.long)
        noisy = torch.empty(rows, copied.unet.config.in_channels, side, side)
        which = torch.zeros(rows, dtype=torch.long)
        output = copied(noisy, torch.zeros(rows, dtype=torch.long), tokens, tokens, which)
        forward = peak.now
        output.float().square().mean().backward()
    return int(max(peak.peak, forward + gradients) if exchanged else peak.peak)
