"""Whether a prompt generates an image or induces a finding in it, which decides the sign under which its map is shown
red."""

from __future__ import annotations

from diffva_ray.config.recipe import DataConfig
from diffva_ray.generate.run import Run
from diffva_ray.schema import Row


def induces(prompt: str, data: DataConfig, label: str | None = None) -> bool:
    """Whether a prompt asks for a finding: it names an abnormal class of the recipe, or the image's own (``label``).

    A prompt that names no class, such as a finding the model was never trained on, is taken to induce it in an image of
    the healthy class, and to generate any other image.
    """
    asked = _plain(prompt)
    healthy = {_plain(data.healthy_prompt), _plain(data.prompt(data.healthy_class))}
    if not asked or asked in healthy:
        return False
    labels = {*data.prompts, *([] if label is None else [label])} - {data.healthy_class}
    if any(name in asked for name in (_plain(data.prompt(one)) for one in labels) if name):
        return True
    return label == data.healthy_class and not any(name in asked for name in healthy if name)


def direction(run: Run, row: Row) -> int:
    """1 where a record (``prompt``, ``label``) generates, -1 where it induces: its map M times this is shown red."""
    return -1 if induces(row["prompt"], run.recipe.data, row["label"]) else 1


def _plain(prompt: str) -> str:
    return " ".join(prompt.split()).casefold()
