"""Training state on disk: everything needed to go on at exactly the next step, in one folder.

There is no random-generator state and no data position to save: both follow from the step (see sampling.py).
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
    """The next step to do: stage index, and step within the stage."""

    stage: int = 0
    step: int = 0


def save_checkpoint(
    folder: Path,
    position: Position,
    fingerprint: str,
    workers: int,
    bundle: Bundle,
    weights: Mapping[str, Mapping[str, torch.Tensor]],
    optimizers: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write ``weights`` (safetensors, by module) and the trainables' ``optimizers`` (with their EMA), then
    ``state.json``, which makes the folder a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, state in weights.items():
        tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        save_file(tensors, folder / f"{name}.safetensors")
    if optimizers:
        torch.save(list(optimizers), folder / "optimizers.pt")
    about = {
        **asdict(position),
        "fingerprint": fingerprint,
        "workers": workers,
        "scaling_factor": bundle.vae.config.scaling_factor,
    }
    (folder / "state.json").write_text(json.dumps(about))


def read_state(folder: Path) -> dict[str, Any]:
    """``state.json``: stage, step, fingerprint, workers, scaling_factor."""
    return json.loads((folder / "state.json").read_text())


def load_weights(folder: Path, bundle: Bundle, modules: Modules) -> None:
    """Put a checkpoint's weights and scaling factor into the bundle and into those ``modules`` it has. Raises
    UnusableModel for weights that do not fit."""
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
    """The states of the trainables' optimizers and EMAs, in their order."""
    return torch.load(folder / "optimizers.pt", map_location="cpu", weights_only=True)


def discard(metrics: dict[str, float], checkpoint: Path | None) -> None:
    """A ``report`` for training without Ray that keeps no checkpoint."""
    if checkpoint is not None:
        shutil.rmtree(checkpoint)


class Checkpoints:
    """A ``report`` for training without Ray: numbered checkpoints below ``folder``, the newest ``keep`` of them."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, metrics: dict[str, float], checkpoint: Path | None) -> None:
        """Take the folder ``checkpoint`` over."""
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
