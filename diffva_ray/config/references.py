"""Loads the reference systems by name, so that the registries below them import none of them."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def reference(path: str) -> Any:
    """A function or class of ``references/``; ``path`` is ``module.name``, as in ``va_gan.generate``."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(f"diffva_ray.references.{module}"), name)
