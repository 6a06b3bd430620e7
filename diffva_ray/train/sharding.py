"""FSDP (``train.sharding: fsdp``): splits parameters, gradients and optimizer state over the workers, for base models
that do not fit into one GPU in training.

A sharded copy of the network is trained. The bundle's network stays complete, on the CPU, and is updated only when it
is needed: for a checkpoint, for a validation, and at the end of the stage. So no other module has to handle shards.
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
    """Return a copy of the network that is sharded over all workers. Each block that its library lists as not to be
    split (``_no_split_modules`` of diffusers and transformers) becomes one FSDP unit, and the rest another."""
    shards = copy.deepcopy(network).to(device)
    names = {name for module in shards.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    for module in reversed(list(shards.modules())):  # inner blocks first
        if type(module).__name__ in names:
            fully_shard(module)
    fully_shard(shards)
    return shards


def gather(shards: nn.Module, network: nn.Module, everywhere: bool = False) -> None:
    """Copy the weights of ``shards`` into ``network``, on the first worker or ``everywhere``. Every worker has to call
    it."""
    state = get_model_state_dict(shards, options=StateDictOptions(full_state_dict=True, cpu_offload=not everywhere))
    if state:
        network.load_state_dict(state)


def optimizer_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the complete optimizer state by parameter name, for a sharded, wrapped or plain network, so that training
    can resume on another number of workers. Empty except on the first worker; every worker has to call it."""
    return get_optimizer_state_dict(network, optimizer, options=WHOLE)


def load_optimizer_state(network: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state of ``optimizer_state`` into the optimizer of a sharded, wrapped or plain network."""
    set_optimizer_state_dict(network, optimizer, state, options=StateDictOptions(full_state_dict=True))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return the complete tensor on the CPU. Every worker has to call it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def like(tensor: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Return a complete tensor on the device of ``model``, sharded as ``model`` is."""
    if isinstance(model, DTensor):
        return distribute_tensor(tensor.to(model.device), model.device_mesh, model.placements)
    return tensor.to(model.device)
