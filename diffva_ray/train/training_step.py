"""One training step: a trainable on its device with optimizer and EMA, and the step that trains it. Nothing in a step
makes the CPU wait for a GPU."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.fsdp import FSDPModule

from diffva_ray.config.recipe import RecipeError
from diffva_ray.config.stages import StageConfig
from diffva_ray.config.training import TrainConfig
from diffva_ray.provenance import missing
from diffva_ray.train.loss import learning_rate
from diffva_ray.train.sharding import gather, like, load_optimizer_state, optimizer_state, sharded, whole
from diffva_ray.train.stage import Inputs, Trainable


class Average(EMAModel):
    """Diffusers' moving average, updated in place: diffusers makes a copy of all parameters in each step."""

    @torch.no_grad()
    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Move the average towards ``parameters``, which all require gradients; the same bits as diffusers' step."""
        if not self.foreach:  # one parameter after the other: the copy is of one
            super().step(parameters)
            return
        self.optimization_step += 1
        decay: float = self.get_decay(self.optimization_step)
        self.cur_decay_value: Any = decay
        current = list[torch.Tensor](parameters)
        if decay > 0.5:
            torch._foreach_lerp_(self.shadow_params, current, 1 - decay)
            return
        for average, value in zip(self.shadow_params, current, strict=True):  # in the first steps lerp rounds otherwise
            torch._foreach_sub_([average], torch._foreach_sub([average], [value]), alpha=1 - decay)


@dataclass
class PreparedTrainable:
    """A trainable on its device, with optimizer and EMA."""

    definition: Trainable  # as the stage declares it
    network: nn.Module  # what ``loss`` is called with: the definition's network, or its DDP wrapper or sharded copy
    parameters: list[nn.Parameter]  # those that require gradients
    optimizer: Any  # Accelerate's wrapper
    ema: Average | None  # moving average of ``parameters``
    rate: float  # base learning rate, before warm-up and schedule

    def state(self) -> dict[str, Any]:
        """Return a copy of optimizer and EMA state on the CPU, complete on the first worker. Every worker has to call
        it."""
        average = None
        if self.ema is not None:
            average = self.ema.state_dict()
            average["shadow_params"] = [whole(tensor) for tensor in average["shadow_params"]]
        state = {"optimizer": optimizer_state(self.network, self.optimizer.optimizer), "ema": average}
        on_cpu = not self.parameters or self.parameters[0].device.type == "cpu"
        return copy.deepcopy(state) if on_cpu else state  # from another device it is a copy already

    def gather(self, everywhere: bool = False) -> None:
        """Copy the weights of a sharded network into the definition's network, on the first worker or ``everywhere``.
        Every worker has to call it."""
        if isinstance(self.network, FSDPModule):
            gather(self.network, self.definition.network, everywhere)


def prepare_trainable(
    train: TrainConfig, accelerator: Accelerator, config: StageConfig, trainable: Trainable
) -> PreparedTrainable:
    """Put the network on its device, sharded or wrapped for several workers, and make its optimizer and EMA."""
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
    ema = Average(parameters, decay=config.ema_decay, foreach=not fsdp) if config.ema_decay else None
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


def restore(trainables: Sequence[PreparedTrainable], states: Sequence[dict[str, Any]]) -> None:
    """Load the optimizer and EMA states of a checkpoint."""
    for trainable, state in zip(trainables, states, strict=True):
        load_optimizer_state(trainable.network, trainable.optimizer.optimizer, state["optimizer"])
        if trainable.ema is not None:
            trainable.ema.load_state_dict(state["ema"])
            trainable.ema.shadow_params = list(map(like, trainable.ema.shadow_params, trainable.parameters))


def train_step(
    accelerator: Accelerator, config: StageConfig, trainable: PreparedTrainable, step: int, shares: Sequence[Inputs]
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Train one trainable for one step: add up the gradients of all shares, then call the optimizer. Return this
    worker's part of the mean loss over the global batch, the gradient norm before clipping (both on the device), and
    the learning rate."""
    rate = learning_rate(
        step, config.steps, trainable.rate, config.warmup_steps, config.schedule, config.final_lr_fraction
    )
    for group in trainable.optimizer.param_groups:
        group["lr"] = rate

    # Accumulate gradients over the shares.
    trainable.optimizer.zero_grad()
    total = torch.zeros((), device=accelerator.device)
    for n, share in enumerate(shares):
        weight = share["rows"] / config.batch_size
        inputs = send_to_device(share["inputs"], accelerator.device, non_blocking=True)
        with _gradient_sync(accelerator, trainable.network, n + 1 < len(shares)):
            with accelerator.autocast():
                loss = trainable.definition.loss(trainable.network, inputs)
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
