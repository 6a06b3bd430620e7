"""The runs behind the paper's tables and figures: images, recipe and prompts of each.

Sampling settings come from the named recipes, which also list what the paper leaves open (``assumed``). The model keeps
its own resolution, tokenizer and batch shape; only the settings of the method come from a recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import yaml

from diffva_ray.config.recipe import DataConfig, GenerateConfig, Recipe, RecipeError, load_recipe, make_recipe
from diffva_ray.generate.plan import Request

METHOD_KEYS = ("method", "scheduler", "strength", "guidance_scale", "num_inference_steps", "source_prompt",
               "negative_prompt", "posterior", "difference", "smoothing")  # fmt: skip
EACH_ABNORMAL = "<each abnormal>"  # as the only prompt: those of the model's abnormal classes
Images = Literal["abnormal", "healthy", "random healthy", "few healthy"]


@dataclass(frozen=True)
class Experiment:
    """One run."""

    name: str  # its folder below runs/
    shows: str  # its tables and figures
    images: Images
    recipe: str | None = None  # None: the model's own
    prompts: tuple[str, ...] = ()  # empty: the recipe's healthy prompt
    changes: tuple[str, ...] = ()  # to the recipe, as of --set
    cardiomegaly: bool = False  # whether real cardiomegaly of CheXpert is the reference set
    of_base: bool = False  # whether the base model before fine-tuning makes it
    limit: int | None = None  # records, as of --limit
    sweep: tuple[tuple[str, tuple[Any, ...]], ...] = ()  # as in Request

    def request(self, data: DataConfig) -> Request:
        """The request to ``diffva generate`` for a model with the classes of ``data``."""
        classes = None if self.images == "abnormal" else (data.healthy_class,)
        prompts = self.prompts
        if prompts == (EACH_ABNORMAL,):
            prompts = tuple(data.prompt(label) for label in data.prompts if label != data.healthy_class)
        if len(prompts) > 1:
            return Request(classes, limit=self.limit, sweep=(("prompt", prompts), *self.sweep))
        return Request(classes, prompts[0] if prompts else None, self.limit, sweep=self.sweep)


SHEET: dict[str, Any] = yaml.safe_load((resources.files(__package__) / "sheet.yaml").read_text("utf-8"))
SETTINGS: dict[str, str] = SHEET["settings"]
SAMPLES: dict[str, int] = SHEET["samples"]  # sizes of random samples


def _experiment(fields: dict[str, Any]) -> Experiment:
    lists: dict[str, Any] = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
    if "sweep" in fields:
        lists["sweep"] = tuple((key, tuple(values)) for key, values in fields["sweep"].items())
    return Experiment(**(fields | lists))


EXPERIMENTS = tuple(map(_experiment, SHEET["experiments"]))


def settings_recipe(base: Recipe, experiment: Experiment, overrides: Sequence[str] = ()) -> Recipe:
    """The model's recipe with the settings of an experiment, then ``overrides`` (--set).

    Raises RecipeError if the result needs another model.
    """
    if experiment.recipe is None:
        return make_recipe(base.model_dump(mode="json"), [*experiment.changes, *overrides])
    named = load_recipe(experiment.recipe)
    values = base.model_dump(mode="json")
    generate = named.generate.model_dump(mode="json")
    values["generate"] |= {key: generate[key] for key in METHOD_KEYS}
    values["data"] |= {"healthy_prompt": named.data.healthy_prompt}
    values |= {"name": named.name, "description": named.description, "assumed": list(named.assumed)}
    recipe = make_recipe(values, [*experiment.changes, *overrides])
    if recipe.model != base.model:
        raise RecipeError("--set model.…: diffva paper does not change the model; train another one instead")
    return recipe


def guided(config: GenerateConfig, prompt: str) -> bool:
    """Whether guidance has an effect: diffusers skips it at 1 or less, and equal prompts give equal branches."""
    return config.guidance_scale > 1 and prompt != config.negative_prompt
