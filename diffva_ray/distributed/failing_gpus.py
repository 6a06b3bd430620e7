"""GPUs that fail under a run: who counts their errors, and when the run goes on without one.

Ray may give a failed GPU to the next actor, and cannot be told to leave it out. So the actor on it keeps the GPU and
refuses shards, each after a pause, in which healthy actors take the others; the driver gives refused shards out again.
"""

from __future__ import annotations

import json
import secrets
import socket
import subprocess
from dataclasses import dataclass

import ray

from diffva_ray.generate.attempts import FOLDER
from diffva_ray.storage.store import Store

MAX_GPU_ERRORS = 2  # of one GPU under one driver, after which it gets no more shards
DEVICES = f"{FOLDER}/devices"


@dataclass(frozen=True)
class Gpu:
    """The GPU of an actor."""

    node: str  # Ray's id
    host: str
    number: str  # Ray's, on the node; empty: the actor has no GPU
    uuid: str = ""  # the driver's, where it says it

    def __str__(self) -> str:
        return f"GPU {self.uuid or self.number} of {self.host}"


def own_gpu() -> Gpu:
    """The GPU that Ray has given to this actor."""
    context = ray.get_runtime_context()
    number = next(iter(context.get_accelerator_ids().get("GPU", [])), "")
    return Gpu(context.get_node_id(), socket.gethostname(), number, _uuid(number) if number else "")


def _uuid(number: str) -> str:
    """UUID of a GPU, from the driver's own tool, which works after CUDA has failed; empty without it."""
    if number.startswith(("GPU-", "MIG-")):
        return number
    query = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader", f"--id={number}"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def note_error(store: Store, driver: str, gpu: Gpu, message: str) -> None:
    """Write down an error of a GPU."""
    content = {"gpu": gpu.uuid or gpu.number, "host": gpu.host, "error": message}
    store.put(f"{_folder(driver, gpu)}/{secrets.token_hex(4)}", json.dumps(content).encode())


def errors(store: Store, driver: str, gpu: Gpu) -> int:
    """Number of errors of a GPU under a driver."""
    return len(list(store.list(_folder(driver, gpu)))) if gpu.number else 0


def _folder(driver: str, gpu: Gpu) -> str:
    return f"{DEVICES}/{driver}/{gpu.node}~{gpu.number}"
