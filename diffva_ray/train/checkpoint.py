"""Training state on disk: everything needed to go on at exactly the next step, in one folder.

There is no random-generator state and no data position to save: both follow from the step (see sampling.py).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from diffva_ray.model.bundle import Bundle


@dataclass(frozen=True)
class Position:
    """The next step to do: stage index, and step within the stage."""

    stage: int = 0
    step: int = 0


def save_checkpoint(
    folder: Path,
    position: Position,
    fingerprint: str,
    bundle: Bundle,
    extra: dict[str, torch.nn.Module],
    optimizer: torch.optim.Optimizer | None = None,
    ema: Any | None = None,
) -> None:
    """Write weights (safetensors), optimizer and EMA, then ``state.json``, which makes the folder a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, module in {**bundle.modules, **extra}.items():
        tensors = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
        save_file(tensors, folder / f"{name}.safetensors")
    if optimizer is not None:
        state = {"optimizer": optimizer.state_dict(), "ema": ema.state_dict() if ema is not None else None}
        torch.save(state, folder / "optimizer.pt")
    about = {**asdict(position), "fingerprint": fingerprint, "scaling_factor": bundle.vae.config.scaling_factor}
    (folder / "state.json").write_text(json.dumps(about))


def read_position(folder: Path) -> Position:
    about = json.loads((folder / "state.json").read_text())
    return Position(about["stage"], about["step"])


def load_weights(folder: Path, bundle: Bundle, extra: dict[str, torch.nn.Module]) -> None:
    """Put a checkpoint's weights and scaling factor into the bundle and into those ``extra`` modules it has."""
    for name, module in {**bundle.modules, **extra}.items():
        file = folder / f"{name}.safetensors"
        if name in bundle.modules or file.exists():
            module.load_state_dict(load_file(file))
    bundle.vae.register_to_config(scaling_factor=json.loads((folder / "state.json").read_text())["scaling_factor"])


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer, ema: Any | None) -> None:
    """Put back the optimizer's moments and the EMA's shadow weights."""
    state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    if ema is not None:
        ema.load_state_dict(state["ema"])
