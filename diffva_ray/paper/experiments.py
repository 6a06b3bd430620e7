"""The runs behind the paper's tables and figures: images, recipe and prompts of each.

Sampling settings come from the named recipes, which also list what the paper leaves open (``assumed``). The model keeps
its own resolution, tokenizer and batch shape; only the settings of the method come from a recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from diffva_ray.config.recipe import GenerateConfig, Recipe, RecipeError, load_recipe, make_recipe
from diffva_ray.generate.plan import Request

METHOD_KEYS = ("method", "scheduler", "strength", "guidance_scale", "num_inference_steps", "source_prompt",
               "negative_prompt", "posterior", "difference", "smoothing")  # fmt: skip
Images = Literal["abnormal", "healthy", "few healthy"]


@dataclass(frozen=True)
class Experiment:
    """One run."""

    name: str  # its folder below runs/
    shows: str  # its tables and figures
    images: Images
    recipe: str | None  # None: the model's own
    prompts: tuple[str, ...] = ()  # empty: the recipe's healthy prompt
    changes: tuple[str, ...] = ()  # to the recipe, as of --set
    cardiomegaly: bool = False  # whether real cardiomegaly of CheXpert is the reference set
    limit: int | None = None  # images

    def request(self, healthy_class: str) -> Request:
        """The request to ``diffva generate``."""
        classes = None if self.images == "abnormal" else (healthy_class,)
        if len(self.prompts) > 1:
            return Request(classes, limit=self.limit, sweep=(("prompt", self.prompts),))
        return Request(classes, self.prompts[0] if self.prompts else None, self.limit)


# Columns of tables 1-3: the paper gives two settings but not which of them the tables use; ours is the third.
SETTINGS = {
    "generate-0.55": "strength 0.55, guidance 4",
    "generate-0.85": "strength 0.85, guidance 7.5",
    "generate-own": "the model's own recipe",
}
SEVERITIES = ("mild", "moderate", "severe")

EXPERIMENTS = (
    Experiment("generate-0.55", "tables 1-3 and 5, figure 3", "abnormal", "paper"),
    Experiment("generate-0.85", "tables 1-3, figure 2", "abnormal", "paper_fig2"),
    Experiment("generate-own", "tables 1-3, our column", "abnormal", None),
    Experiment("healthy-0.55", "false attribution", "healthy", "paper"),
    Experiment("healthy-own", "false attribution", "healthy", None),
    Experiment("cardiomegaly", "table 4", "healthy", "paper_induction", ("Cardiomegaly",), cardiomegaly=True),
    Experiment("no-text", "table 5, figure 7", "abnormal", "paper_table5_no_text"),
    Experiment("no-image-prior", "table 5, figure 8", "abnormal", "paper_table5_no_image_prior"),
    Experiment("neither", "table 5, figure 9", "abnormal", "paper_table5_neither"),
    Experiment("no-text-guidance-1", "table 5: guidance of 1 or less has no effect", "abnormal", "paper_table5_no_text",
               changes=("generate.guidance_scale=1.0",), limit=16),
    Experiment("prompt-only", "table 5: only the text removed", "abnormal", "paper", ("",)),
    Experiment("carcinoma", "figure 4", "few healthy", "paper_induction",
               tuple(f"{severity} lung carcinoma" for severity in SEVERITIES)),
    Experiment("cardiomegaly-severity", "figure 5", "few healthy", "paper_induction",
               tuple(f"{severity} cardiomegaly" for severity in SEVERITIES)),
    Experiment("inductions", "figure 6", "few healthy", "paper_induction",
               ("COVID 19", "Lung Opacity", "Viral Pneumonia")),
    Experiment("sides", "figure 10", "few healthy", "paper_induction",
               ("large lung opacity on the left", "large lung opacity on the right")),
)  # fmt: skip

# Choices that the text of the paper leaves open.
ASSUMED = (
    "the numbers of figures 3 to 10 and their prompts, except “large lung opacity on the left”",
    "tables 1-3 use every image of a class; the paper says “randomly-sampled images” and “all images”",
    "table 4: healthy images of the Radiography Database become cardiomegaly; prompt “Cardiomegaly”",
    "table 5: counterfactuals of the same abnormal images as in table 2, against real healthy images",
)


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
