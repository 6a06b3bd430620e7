"""Checkpoints of a running training, written in a thread while the next steps run.

A step copies the state to the CPU's memory, and a thread writes it. All workers report the checkpoint at a later step,
when it is written; until then a killed training resumes from the one before.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from diffva_ray.config.training import TrainConfig
from diffva_ray.model.bundle import Bundle
from diffva_ray.model.training_images import IMAGE_DIGITS
from diffva_ray.storage.foreign_writes import foreign_writes
from diffva_ray.train.checkpoint import CheckpointState, Position, Report, save_checkpoint
from diffva_ray.train.logger import TrainingLogger
from diffva_ray.train.sampling import ImageSet
from diffva_ray.train.training_step import PreparedTrainable


@dataclass
class Saver:
    """Writes the checkpoints of one training. All its methods but ``signals`` are called by every worker at the same
    step."""

    config: TrainConfig
    bundle: Bundle
    modules: Mapping[str, nn.Module]  # networks of the stages that checkpoints keep beside the bundle's own
    images: ImageSet
    accelerator: Accelerator
    fingerprint: str  # of the training
    report: Report
    logger: TrainingLogger
    scratch: Path | None  # where checkpoints are written first; None: the system's temporary folder
    base: Mapping[str, Mapping[str, str]]  # digests of the weights before the first stage, by network and name
    trained_on: set[str] = field(default_factory=set)  # digests of the images that earlier processes have read
    _begun: float = field(default_factory=time.monotonic)  # when the last checkpoint was
    _metrics: dict[str, float] | None = None  # of the checkpoint that is not reported yet
    _written: Future[Path] | None = None  # its folder, on the first worker
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *error: object) -> None:
        """Delete a checkpoint that was not reported."""
        self._thread.shutdown()
        if self._written is not None and self._written.exception() is None:
            shutil.rmtree(self._written.result(), ignore_errors=True)

    def signals(self) -> list[float]:
        """Return what the first worker tells the others with the next losses: whether the time for a checkpoint has
        come, and whether the last one is written."""
        if not self.accelerator.is_main_process:
            return [0.0, 0.0]
        due = time.monotonic() - self._begun >= 60 * self.config.checkpoint_minutes
        return [float(due), float(self._written is not None and self._written.done())]

    def save(self, position: Position, trainables: Sequence[PreparedTrainable]) -> None:
        """Copy the state and have it written. Waits for the checkpoint before, if that is not written yet."""
        self.finish()
        self._begun = time.monotonic()
        newest = self.logger.history[-1] if self.logger.history else {}
        self._metrics = {key: value for key, value in newest.items() if isinstance(value, float)}
        self._metrics |= {"stage_index": float(position.stage), "step": float(position.step)}

        # Every worker takes part in gathering shards and digests.
        for trainable in trainables:
            trainable.gather()
        states = [trainable.state() for trainable in trainables]
        images = self.digests()
        if not self.accelerator.is_main_process:
            return

        self.logger.keep()
        with foreign_writes(self.scratch or Path(tempfile.gettempdir()), "a checkpoint"):
            folder = Path(tempfile.mkdtemp(prefix=".tmp-diffva-checkpoint-", dir=self.scratch))
        modules = {**self.bundle.modules, **self.modules}
        weights = {
            name: {key: value.detach().to("cpu", copy=True) for key, value in module.state_dict().items()}
            for name, module in modules.items()
        }
        scaler = self.accelerator.scaler
        state = CheckpointState(
            stage=position.stage,
            step=position.step,
            fingerprint=self.fingerprint,
            workers=self.accelerator.num_processes,
            scaling_factor=self.bundle.vae.config.scaling_factor,
            scaler=scaler.state_dict() if scaler is not None else {},
            images=images,
        )
        self._written = self._thread.submit(_write, folder, state, weights, states, self.base)

    def finish(self) -> None:
        """Wait until the last checkpoint is written, and report it. Raises StoreError if it cannot be written."""
        if self._metrics is None:
            return
        metrics, self._metrics = self._metrics, None
        written, self._written = self._written, None
        self.report(metrics, written.result() if written is not None else None)

    def digests(self) -> list[str]:
        """Return the digests of all images that the training has read, on any worker, without reading any."""
        read = sorted({sha256[:IMAGE_DIGITS] for sha256 in self.images.read_sha256()} - self.trained_on)
        self.trained_on.update(gather_object(read))
        return sorted(self.trained_on)


def _write(
    folder: Path, state: CheckpointState, weights: Mapping[str, Mapping[str, torch.Tensor]], optimizers: list[Any],
    base: Mapping[str, Mapping[str, str]],
) -> Path:  # fmt: skip
    try:
        save_checkpoint(folder, state, weights, optimizers, base)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder
