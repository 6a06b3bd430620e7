"""How the work of a command is carried out, and with which recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffva_ray.config.recipe import (
    Recipe,
    load_recipe,
    make_recipe,
)
from diffva_ray.model.card import UnusableModel, read_card
from diffva_ray.storage.store import open_store

Executor = Literal["ray", "inline"]  # on a Ray, or a plain loop in this process


def model_recipe(model: str, recipe: str | None, overrides: tuple[str, ...]) -> Recipe:
    """The recipe to work with a model: the one named, or the one the model was trained with."""
    if recipe is not None:
        return load_recipe(recipe, overrides)
    card = read_card(open_store(model))
    if card is None:
        raise UnusableModel(
            f"--model {model}: no diffva.json there; train a model first, or name a recipe with --recipe"
        )
    return make_recipe(card["recipe"], overrides)


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a run is carried out; none of it changes a pixel."""

    executor: Executor = "ray"
    actors: int | None = None
    gpus_per_actor: float | None = None
    allow_environment_change: bool = False
