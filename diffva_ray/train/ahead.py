"""Inputs of the next steps, made in a thread while the device computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from accelerate.utils import recursively_apply

from diffva_ray.config.stages import StageConfig
from diffva_ray.train.sampling import step_generator
from diffva_ray.train.stage import Batch, Inputs, Trainable

AHEAD = 2  # steps

StepInputs = list[list[Inputs]]  # by trainable, then by share of the worker's batch


def inputs_of(
    seed: int, config: StageConfig, trainables: Sequence[Trainable], rank: int = 0, workers: int = 1
) -> Callable[[int], StepInputs]:
    """Return the function that makes a worker's inputs of a step: those of its rows of the global batch, in shares of
    at most ``micro_batch_size``."""
    rows = list(range(rank * config.batch_size // workers, (rank + 1) * config.batch_size // workers))
    size = config.micro_batch_size or len(rows)
    shares = [rows[at : at + size] for at in range(0, len(rows), size)]

    def made(trainable: Trainable, step: int, share: list[int]) -> Inputs:
        batch = Batch(step, config.batch_size, share, step_generator(seed, config.name, step))
        return {"rows": len(share), "inputs": trainable.inputs(batch)}

    return lambda step: [[made(trainable, step, share) for share in shares] for trainable in trainables]


class Ahead:
    """Iterates over ``steps`` with their inputs, of which it has the next AHEAD steps made, one after the other. Inputs
    follow from the step alone, so that those of steps that are never trained cost nothing but their time."""

    def __init__(self, make: Callable[[int], StepInputs], steps: range, device: torch.device) -> None:
        self.make, self.steps, self.pinned = make, steps, device.type == "cuda"
        self.thread = ThreadPoolExecutor(1, "inputs")
        self.pending: deque[Future[StepInputs]] = deque()

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *error: object) -> None:
        self.thread.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[tuple[int, StepInputs]]:
        for step in self.steps:
            first = step + len(self.pending)
            for later in range(first, min(step + AHEAD + 1, self.steps.stop)):
                self.pending.append(self.thread.submit(self._made, later))
            yield step, self.pending.popleft().result()

    def _made(self, step: int) -> StepInputs:
        inputs = self.make(step)
        if not self.pinned:
            return inputs
        pinned: StepInputs = recursively_apply(torch.Tensor.pin_memory, inputs)  # copied without a wait
        return pinned
