"""FSDP (``train.sharding: fsdp``): a network whose parameters, gradients and optimizer state lie in shards on the
workers, for bases that one GPU cannot hold in training.

A sharded copy trains; the network of the bundle stays whole, on the CPU, and is brought up to date when somebody looks
at it: a checkpoint, a validation, the end of the stage. So nothing else has to know of shards.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def sharded(network: nn.Module, device: torch.device) -> nn.Module:
    """A sharded copy of a network, over all workers: a shard of its own for each block that its libraries say is not to
    be split (``_no_split_modules`` of diffusers and transformers), the rest in one."""
    made = copy.deepcopy(network).to(device)
    names = {name for module in made.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    for module in reversed(list(made.modules())):  # inner blocks first
        if type(module).__name__ in names:
            fully_shard(module)
    fully_shard(made)
    return made


def gather(shards: nn.Module, network: nn.Module, everywhere: bool = False) -> None:
    """Bring the first worker's ``network`` up to date, or every worker's; all of them take part."""
    state = get_model_state_dict(shards, options=StateDictOptions(full_state_dict=True, cpu_offload=not everywhere))
    if state:
        network.load_state_dict(state)


def optimizer_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Whole and by the names of parameters, whether the network is sharded, wrapped or plain, so that another number of
    workers can go on with it. On the first worker (empty on the others); every worker takes part."""
    return get_optimizer_state_dict(network, optimizer, options=WHOLE)


def load_optimizer_state(network: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    set_optimizer_state_dict(network, optimizer, state, options=StateDictOptions(full_state_dict=True))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with all of its shards, on the CPU; every worker takes part."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def like(tensor: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """A whole tensor on the device, and in the shards, of ``model``."""
    if isinstance(model, DTensor):
        return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements)
    return tensor.to(model.device)
