"""Checkpoints: one folder with everything that is needed to resume exactly at the next step.

Random-generator states and the position in the data are not saved: both follow from the step (see sampling.py). Nor are
weights that the training has not changed, such as a frozen autoencoder: they are those of the base model.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffva_ray.model.bundle import Bundle
from diffva_ray.model.card import UnusableModel, file_sha256
from diffva_ray.progress import LOG, one_line
from diffva_ray.storage.foreign_writes import foreign_writes, sync_tree

Modules = Mapping[str, torch.nn.Module]
Report = Callable[[dict[str, float], Path | None], None]  # (metrics, checkpoint folder, which the callee now owns)
STATE, OPTIMIZERS = "state.json", "optimizers.pt"
NAME = re.compile(r"checkpoint-\d+-\d+")  # of a checkpoint of ``Checkpoints``


@dataclass(frozen=True)
class Position:
    """The next step to train."""

    stage: int = 0  # index in ``train.stages``
    step: int = 0  # within the stage, counted from 0


class CheckpointState(BaseModel):
    """The content of ``state.json``."""

    stage: int
    step: int
    fingerprint: str  # of the training
    workers: int
    scaling_factor: float  # of the autoencoder's latents
    scaler: dict[str, int | float] = {}  # state of the gradient scaler of fp16; empty: none
    images: list[str] = []  # digests of the images that the training has read
    unchanged: dict[str, str] = {}  # digest of the weights that are the base model's, by network
    files: dict[str, str] = {}  # sha256 by name; checkpoints of earlier versions have none


def tensor_digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """sha256 of each tensor's bytes, by name."""
    views = {name: tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for name, tensor in tensors.items()}
    return {name: hashlib.sha256(view.numpy().data).hexdigest() for name, view in views.items()}


def _digest(digests: Mapping[str, str]) -> str:
    """One digest of those of several tensors."""
    return hashlib.sha256("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()).hexdigest()


def save_checkpoint(
    folder: Path,
    state: CheckpointState,
    weights: Mapping[str, Mapping[str, torch.Tensor]],
    optimizers: Sequence[Mapping[str, Any]] = (),
    base: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Write ``weights`` (one safetensors file for each module, of tensors on the CPU), the trainables' ``optimizers``
    (with EMA states), and last ``state.json``, which has the digests of the other files. Weights whose digest is that
    in ``base``, by network and name, are left out. Raises StoreError when the disk fails."""
    unchanged = dict[str, str]()
    with foreign_writes(folder, "a checkpoint"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, values in weights.items():
            old = (base or {}).get(name, {})
            same = dict(tensor_digests(values).items() & old.items()) if old else {}
            if same:
                unchanged[name] = _digest(same)
            if changed := {key: value.contiguous() for key, value in values.items() if key not in same}:
                save_file(changed, folder / f"{name}.safetensors")
        if optimizers:
            torch.save(list(optimizers), folder / OPTIMIZERS)
        files = {file.name: file_sha256(file) for file in folder.iterdir()}
        state = state.model_copy(update={"files": files, "unchanged": unchanged})
        (folder / STATE).write_text(state.model_dump_json())
        sync_tree(folder)


def read_state(folder: Path) -> CheckpointState:
    """Read ``state.json``. Raises OSError or ValueError for a damaged one."""
    return CheckpointState.model_validate_json((folder / STATE).read_bytes())


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, in one line; None for a sound one."""
    try:
        files = read_state(folder).files
        wrong = [name for name, sha256 in files.items() if file_sha256(folder / name) != sha256]
    except (OSError, ValueError) as error:
        return one_line(error, 120)
    return f"{wrong[0]} has other content than {STATE} lists" if wrong else None


def note_damage(folder: Path | str, what: str) -> None:
    """Log that a checkpoint is passed over."""
    LOG.warning("the checkpoint %s is damaged (%s); trying the one before it", folder, what)


def all_damaged(folder: Path | str) -> UnusableModel:
    """The error when no checkpoint is sound."""
    return UnusableModel(f"{folder}: no checkpoint there is sound; delete that folder to train from the start")


def load_weights(folder: Path, bundle: Bundle, modules: Modules) -> None:
    """Load a checkpoint's weights and scaling factor into the bundle, which has the weights of the base model, and into
    those ``modules`` that the checkpoint contains. Raises UnusableModel for weights that do not fit."""
    state = read_state(folder)
    for name, module in {**bundle.modules, **modules}.items():
        file = folder / f"{name}.safetensors"
        if name in bundle.modules or file.exists():
            try:
                changed = load_file(file) if file.exists() or name not in state.unchanged else {}
                kept = {key: value for key, value in module.state_dict().items() if key not in changed}
                if name in state.unchanged and _digest(tensor_digests(kept)) != state.unchanged[name]:
                    raise UnusableModel(
                        f"the base model has other weights ({name}) than when the checkpoint {folder} was written; "
                        "restore that base model, or delete the checkpoint to train from the start"
                    )
                module.load_state_dict({**kept, **changed} if name in state.unchanged else changed)
            except (RuntimeError, OSError, SafetensorError) as error:
                raise UnusableModel(
                    f"the checkpoint {folder} does not fit this version of diffva-ray ({file.name}: "
                    f"{one_line(error, 160)}); delete it to train from the start"
                ) from None
    bundle.vae.register_to_config(scaling_factor=state.scaling_factor)


def load_optimizers(folder: Path) -> list[dict[str, Any]]:
    """Load the optimizer and EMA states, in the order of the stage's trainables. Raises UnusableModel."""
    try:
        states: list[dict[str, Any]] = torch.load(folder / OPTIMIZERS, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, UnpicklingError) as error:
        raise UnusableModel(
            f"the checkpoint {folder} cannot be read ({OPTIMIZERS}: {one_line(error, 160)}); delete it"
        ) from None
    return states


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
        with foreign_writes(self.folder, "a checkpoint"):
            for old in (staging, target):
                shutil.rmtree(old, ignore_errors=True)
            try:
                shutil.move(checkpoint, staging)
            except OSError:
                shutil.rmtree(staging, ignore_errors=True)
                shutil.rmtree(checkpoint, ignore_errors=True)
                raise
            sync_tree(staging)
            staging.replace(target)
            for old in self._sorted()[: -self.keep]:
                shutil.rmtree(old)

    def latest(self) -> Path | None:
        """The newest sound checkpoint; None if there is none at all. Raises UnusableModel if all are damaged."""
        found = self._sorted()
        for folder in reversed(found):
            what = damage(folder)
            if what is None:
                return folder
            note_damage(folder, what)
        if found:
            raise all_damaged(self.folder)
        return None

    def _sorted(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir())
