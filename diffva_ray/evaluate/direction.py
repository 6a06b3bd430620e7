"""Decides whether a prompt removes or induces a finding, and so which sign of the attribution map is shown red."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffva_ray.config.prompts import wanted
from diffva_ray.config.recipe import DataConfig
from diffva_ray.generate.run import Run


def induces(prompt: str, data: DataConfig, label: str | None = None) -> bool:
    """Whether a prompt induces a finding: it names an abnormal class of the recipe, or the image's own (``label``).

    A prompt that names no class, such as a finding that the model was not trained on, induces it in an image of the
    healthy class and removes findings from any other image.
    """
    text = _plain(wanted(prompt))
    healthy = {_plain(data.healthy_prompt), _plain(data.prompt(data.healthy_class))}
    if not text or text in healthy:
        return False
    labels = {*data.prompts, *([] if label is None else [label])} - {data.healthy_class}
    if any(name in text for name in (_plain(data.prompt(other)) for other in labels) if name):
        return True
    return label == data.healthy_class and not any(name in text for name in healthy if name)


def direction(run: Run, row: Mapping[str, Any]) -> int:
    """1 for a record (``prompt``, ``label``) that removes a finding, -1 for one that induces it.

    The attribution map is multiplied by it before positive values are shown red."""
    return -1 if induces(row["prompt"], run.recipe.data, row["label"]) else 1


def _plain(prompt: str) -> str:
    return " ".join(prompt.split()).casefold()
