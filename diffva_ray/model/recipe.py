"""The recipe with which a model is used: its own, or another with the classes that it was trained on."""

from __future__ import annotations

from diffva_ray.config.recipe import DataConfig, Recipe, load_recipe, make_recipe
from diffva_ray.model.card import UnusableModel, read_card
from diffva_ray.storage.opening import open_store

OF_A_TABLE = ("columns", "root")  # keys of section data that belong to the training table, not to other data
OF_A_MODEL = ("prompts", "healthy_class")  # keys of section data that say what the model was trained on


def model_recipe(model: str, recipe: str | None, overrides: tuple[str, ...]) -> Recipe:
    """Load ``recipe`` if given, with the classes that the model was trained on, otherwise the recipe that the model was
    trained with. Raises UnusableModel if there is neither."""
    card = read_card(open_store(model))
    if card is None and recipe is None:
        raise UnusableModel(
            f"--model {model}: no diffva.json there; train a model first (one of the hub is a base for that: "
            "--set model.base=ID), or name a recipe with --recipe"
        )
    if card is None:
        return load_recipe(str(recipe), overrides)
    stored = card["recipe"]
    own = {key: value for key, value in stored.get("data", {}).items() if key not in OF_A_TABLE}
    values = {**stored, "data": own}
    if recipe is not None:
        values = load_recipe(recipe).model_dump(mode="json")
        values["data"] |= {key: own[key] for key in OF_A_MODEL if key in own}
    return _healthy_renamed(make_recipe(values, overrides), own.get("healthy_class", DataConfig().healthy_class))


def _healthy_renamed(recipe: Recipe, trained: str) -> Recipe:
    """The recipe with the prompt of the model's healthy class for the healthy class of the data, which may have another
    name."""
    data = recipe.data
    if data.healthy_class in data.prompts:
        return recipe
    names = {trained: data.healthy_class}
    prompts = {names.get(label, label): prompt for label, prompt in data.prompts.items()}
    return recipe.model_copy(update={"data": data.model_copy(update={"prompts": prompts})})
