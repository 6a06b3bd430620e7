"""What ``--dry-run`` prints: a few lines on a terminal, one JSON document for a file or a program."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from diffva_ray.commands.verb import echo
from diffva_ray.config.recipe import Recipe

WHOLE = "nothing was written; `| cat` behind the command prints the whole recipe as JSON"


def show(recipe: Recipe, **intent: Any) -> None:
    """Print the recipe and the planned work."""
    if sys.stdout.isatty():
        return echo("\n".join(summary(recipe, intent)))
    echo(document({**intent, "recipe": recipe.model_dump(mode="json")}))


def summary(recipe: Recipe, intent: Mapping[str, Any]) -> Iterator[str]:
    """Lines with what matters: name of the recipe, sampling settings, and a line for each item of the planned work."""
    yield f"recipe {recipe.name}, {recipe.model.resolution} px: {recipe.description}"
    for key, value in intent.items():
        if isinstance(value, Mapping):
            yield f"{key}: {_pairs(value)}"
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
            yield from (_pairs(item) for item in value)
        elif key == "summary":
            yield from value
        elif value is not None:
            yield f"{key}: {', '.join(map(str, value)) if isinstance(value, (list, tuple)) else value}"
    yield WHOLE


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in values.items() if value not in (None, []))


def document(value: Any, depth: int = 2, margin: str = "") -> str:
    """JSON with a line for each item of the work and for each section of the recipe."""
    if not (depth and isinstance(value, dict)):
        return json.dumps(value)
    items = (f"{margin} {json.dumps(key)}: {document(item, depth - 1, margin + ' ')}" for key, item in value.items())
    return "{\n" + ",\n".join(items) + f"\n{margin}}}"
