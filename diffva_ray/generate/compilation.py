"""Compiles the networks of a worker before its first shard: on each machine one worker first, then the others, which
read the compiler's cache."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.counterfactual.exact_device import is_device_error, is_out_of_memory
from diffva_ray.generate.run import Unfinished
from diffva_ray.progress import one_line

LOCK = Path(tempfile.gettempdir()) / f"diffva-compiles-{os.getuid()}.lock"
COMPILERS = ("torch._dynamo", "torch._inductor", "torch._functorch", "triton")  # modules of a compiler's errors


def compile_networks(engine: CounterfactualEngine, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the networks and generate a micro-batch of blank images, so that a shard finds them compiled.

    Networks that do not fit into the memory are left to the first shard, which counts such failures.

    Args:
        engine: The worker's engine; ``engine.compile`` has not been called.
        backend: As for ``engine.compile``.

    Raises:
        Unfinished: The networks cannot be compiled here. The worker does not go on without, because the images of a run
            would then depend on which worker generated them.
    """
    blank = np.full((engine.size, engine.size), 0.5, np.float32)
    conditions = dict.fromkeys(engine.condition_columns(), np.stack([blank] * 3))
    count = engine.config.micro_batch
    try:
        engine.compile(backend)
        with first_alone(LOCK):
            engine([blank] * count, [0] * count, conditions=[conditions] * count)
    except (ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            torch.cuda.empty_cache()
        elif is_device_error(error) or not (isinstance(error, ValueError) or _is_of_a_compiler(error)):
            raise
        else:
            raise Unfinished(
                f"generate.compile: the networks cannot be compiled on this machine ({one_line(error, 200)}); correct "
                "that, or add --set generate.compile=false, which is slower and another run"
            ) from error


def _is_of_a_compiler(error: BaseException) -> bool:
    return any(kind.__module__.startswith(COMPILERS) for kind in type(error).__mro__)


@contextmanager
def first_alone(path: Path) -> Iterator[None]:
    """Let one process of a machine through, and the others, together, when it is done. The lock of a process that dies
    is released."""
    with path.open("w") as file:
        with suppress(OSError):  # on a file system without locks all go at once
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fcntl.flock(file, fcntl.LOCK_SH)
        yield
