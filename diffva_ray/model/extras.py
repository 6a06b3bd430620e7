"""Loads the networks of single methods, such as a ControlNet. Each is a folder of the model with ``config.json`` and
safetensors, is trained by a stage of the same name, and is part of the digest; ``DiffusionPipeline`` ignores it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from diffva_ray.model.card import EXTRAS, UnusableModel


def load_extra(folder: Path | None, name: str) -> Any:
    """Loads the network ``name`` (a key of EXTRAS) from a local model folder; None: the model is not saved yet.

    Raises ValueError for an unknown name, UnusableModel when the model has no such network.
    """
    if name not in EXTRAS:
        raise ValueError(f"unknown network {name!r}; there are {', '.join(EXTRAS)}")
    if folder is None or not (folder / name / "config.json").exists():
        kind = name.replace("_", "-")
        raise UnusableModel(f"the model has no {name}; train it with a stage that `trains: {kind}`")
    module, _, network = EXTRAS[name].partition(":")
    return getattr(importlib.import_module(module), network).from_pretrained(folder / name, use_safetensors=True)
