"""Options that several commands share: how a run is executed, and with which recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffva_ray.config.recipe import (
    Recipe,
    load_recipe,
    make_recipe,
)
from diffva_ray.model.card import UnusableModel, read_card
from diffva_ray.storage.opening import open_store

OF_A_TABLE = ("columns", "root")  # keys of section data that belong to the training table, not to other data
Executor = Literal["ray", "inline"]  # on Ray, or in a plain loop in this process


def model_recipe(model: str, recipe: str | None, overrides: tuple[str, ...]) -> Recipe:
    """Load ``recipe`` if given, otherwise the recipe that the model was trained with. Raises UnusableModel if there is
    neither."""
    if recipe is not None:
        return load_recipe(recipe, overrides)
    card = read_card(open_store(model))
    if card is None:
        raise UnusableModel(
            f"--model {model}: no diffva.json there; train a model first, or name a recipe with --recipe"
        )
    stored = card["recipe"]
    own = {key: value for key, value in stored.get("data", {}).items() if key not in OF_A_TABLE}
    return make_recipe({**stored, "data": own}, overrides)


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a run is executed; no field changes a pixel."""

    executor: Executor = "ray"  # ``inline``: one plain loop in this process
    actors: int | None = None  # None: one for each GPU, or for each CPU if there is no GPU
    gpus_per_actor: float | None = None  # None: 1 if the cluster has GPUs, otherwise 0
    allow_environment_change: bool = False  # continue a run with another torch version or kind of device
