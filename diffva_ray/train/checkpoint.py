"""Checkpoints: one folder with everything that is needed to resume exactly at the next step.

Random-generator states and the position in the data are not saved: both follow from the step (see sampling.py).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from diffva_ray.model.bundle import Bundle
from diffva_ray.model.card import UnusableModel
from diffva_ray.progress import one_line

Modules = Mapping[str, torch.nn.Module]


@dataclass(frozen=True)
class Position:
    """The next step to train."""

    stage: int = 0  # index in ``train.stages``
    step: int = 0  # within the stage, counted from 0


def save_checkpoint(
    folder: Path,
    position: Position,
    fingerprint: str,
    workers: int,
    bundle: Bundle,
    weights: Mapping[str, Mapping[str, torch.Tensor]],
    optimizers: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write ``weights`` (one safetensors file for each module), the trainables' ``optimizers`` (with EMA states), and
    last ``state.json``, which marks the checkpoint as complete."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, state in weights.items():
        tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        save_file(tensors, folder / f"{name}.safetensors")
    if optimizers:
        torch.save(list(optimizers), folder / "optimizers.pt")
    state_json = {
        **asdict(position),
        "fingerprint": fingerprint,
        "workers": workers,
        "scaling_factor": bundle.vae.config.scaling_factor,
    }
    (folder / "state.json").write_text(json.dumps(state_json))


def read_state(folder: Path) -> dict[str, Any]:
    """Read ``state.json``: stage, step, fingerprint, workers, scaling_factor."""
    return json.loads((folder / "state.json").read_text())


def load_weights(folder: Path, bundle: Bundle, modules: Modules) -> None:
    """Load a checkpoint's weights and scaling factor into the bundle, and into those ``modules`` that the checkpoint
    contains. Raises UnusableModel for weights that do not fit."""
    for name, module in {**bundle.modules, **modules}.items():
        file = folder / f"{name}.safetensors"
        if name in bundle.modules or file.exists():
            try:
                module.load_state_dict(load_file(file))
            except (RuntimeError, OSError) as error:
                raise UnusableModel(
                    f"the checkpoint {folder} does not fit this version of diffva-ray ({file.name}: "
                    f"{one_line(error, 160)}); delete it to train from the start"
                ) from None
    bundle.vae.register_to_config(scaling_factor=read_state(folder)["scaling_factor"])


def load_optimizers(folder: Path) -> list[dict[str, Any]]:
    """Load the optimizer and EMA states, in the order of the stage's trainables."""
    return torch.load(folder / "optimizers.pt", map_location="cpu", weights_only=True)


def discard(metrics: dict[str, float], checkpoint: Path | None) -> None:
    """Delete the checkpoint: a ``report`` for training without Ray that keeps none."""
    if checkpoint is not None:
        shutil.rmtree(checkpoint)


class Checkpoints:
    """A ``report`` for training without Ray: keeps the newest ``keep`` checkpoints, numbered, below ``folder``."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, metrics: dict[str, float], checkpoint: Path | None) -> None:
        """Move the folder ``checkpoint`` below ``folder`` and delete the oldest checkpoints."""
        if checkpoint is None:
            return
        target = self.folder / f"checkpoint-{int(metrics['stage_index']):02d}-{int(metrics['step']):07d}"
        staging = self.folder / f".tmp-{target.name}"
        for old in (staging, target):
            shutil.rmtree(old, ignore_errors=True)
        shutil.move(checkpoint, staging)
        staging.replace(target)
        for old in sorted(self.folder.glob("checkpoint-*"))[: -self.keep]:
            shutil.rmtree(old)

    def latest(self) -> Path | None:
        """The newest checkpoint that was finished."""
        found = sorted(self.folder.glob("checkpoint-*"))
        return found[-1] if found else None
