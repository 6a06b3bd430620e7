"""Process groups of a private cluster, whose processes are all on this machine and listen on loopback only.

PyTorch's TCPStore, Ray Train's meeting point, listens on all interfaces and lets anybody write. Here the workers meet
in a file, and gloo and NCCL are bound to the loopback interface.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch.distributed
from ray.train.torch.config import _TorchBackend

INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


class LoopbackConfig(ray.train.torch.TorchConfig):
    """Ray Train's ``TorchConfig`` for workers on one machine."""

    @property
    def backend_cls(self) -> type[LoopbackBackend]:
        return LoopbackBackend


class LoopbackBackend(_TorchBackend):
    """Starts the process group of a worker group."""

    folder = ""  # of the file in which the workers meet; later groups need it, too

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        gpus = worker_group.get_resources_per_worker().get("GPU", 0)
        backend = backend_config.backend or ("nccl" if gpus else "gloo")
        self.folder, size = tempfile.mkdtemp(prefix="diffva-rendezvous-"), len(worker_group)
        arguments = [(backend, self.folder, rank, size, backend_config.timeout_s) for rank in range(size)]
        ray.get([worker_group.execute_single_async(rank, _join, *arguments[rank]) for rank in range(size)])

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        super().on_shutdown(worker_group, backend_config)
        shutil.rmtree(self.folder, ignore_errors=True)


def _join(backend: str, folder: str, rank: int, size: int, timeout: int) -> None:
    """Join the process group in a worker, with the environment variables that Ray Train's own backend sets."""
    context = ray.train.get_context()
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ.update(
        dict.fromkeys(INTERFACES, loopback),
        LOCAL_RANK=str(context.get_local_rank()),
        LOCAL_WORLD_SIZE=str(context.get_local_world_size()),
        NODE_RANK=str(context.get_node_rank()),
        RANK=str(context.get_world_rank()),
        WORLD_SIZE=str(context.get_world_size()),
        ACCELERATE_TORCH_DEVICE=str(ray.train.torch.get_device()),
    )
    torch.distributed.init_process_group(
        backend, f"file://{Path(folder, 'store')}", timedelta(seconds=timeout), world_size=size, rank=rank
    )
