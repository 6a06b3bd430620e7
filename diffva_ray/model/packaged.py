"""The models that come with the package."""

from __future__ import annotations

from pathlib import Path

from diffva_ray.storage.packaged import SCHEME

SMALL = "small"
MODELS = (SMALL,)


def model_address(model: str) -> str:
    """The address of a model: a packaged one for its name, unless a folder has that name; anything else unchanged."""
    return f"{SCHEME}://{model}" if model in MODELS and not Path(model).exists() else model
