"""Networks that some methods need beside the pipeline's own, each a folder of the model with ``config.json`` and
safetensors: trained by a stage of the same name, part of the digest, left alone by ``DiffusionPipeline``."""

from __future__ import annotations

import importlib
from typing import Any

from diffva_ray.model.card import EXTRAS, UnusableModel


def extra_class(name: str) -> Any:
    """The class of an extra network."""
    module, _, kind = EXTRAS[name].partition(":")
    return getattr(importlib.import_module(module), kind)


def load_extra(folder: Any, name: str) -> Any:
    """The extra network ``name`` of a local model folder (a Path, or None for a model not saved yet). Raises
    UnusableModel when it has none."""
    if name not in EXTRAS:
        raise ValueError(f"unknown network {name!r}; there are {', '.join(EXTRAS)}")
    if folder is None or not (folder / name / "config.json").exists():
        kind = name.replace("_", "-")
        raise UnusableModel(f"the model has no {name}; train it with a stage that `trains: {kind}`")
    return extra_class(name).from_pretrained(folder / name, use_safetensors=True)
