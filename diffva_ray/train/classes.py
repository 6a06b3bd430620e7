"""Fits a recipe to a data set: the recipe says how to train, the data set says which classes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from diffva_ray.config.recipe import DataConfig, Recipe
from diffva_ray.config.stages import ABNORMAL, EACH, HEALTHY, DenoiserConfig, StageConfig
from diffva_ray.data.captions import Captions
from diffva_ray.data.dataset import Dataset, UnusableData


def fitted(recipe: Recipe, dataset: Dataset) -> Recipe:
    """The recipe with the classes of the data set: in the weights of its stages, in its prompts and in its healthy
    prompt. A recipe that is fitted already stays as it is. Raises UnusableData for classes that the data set lacks.

    ``data.prompts`` then has exactly the classes that the denoiser is trained on, in the order of the recipe's own
    prompts, then by name.
    """
    classes, data = dataset.classes, recipe.data
    symbols = {key for stage in recipe.train.stages for key in stage.classes}
    if symbols & {ABNORMAL, EACH} and set(classes) <= {data.healthy_class}:
        raise UnusableData(f"--data {dataset.store.uri}: contains only the healthy class {data.healthy_class}")
    ordered = [label for label in data.prompts if label in classes]
    ordered += [label for label in classes if label not in ordered]
    stages = tuple(new for stage in recipe.train.stages for new in _fitted_stages(stage, ordered, data.healthy_class))
    used = {label for stage in stages for label in (*stage.classes, *_prior_class(stage))}
    if absent := sorted(used - set(classes)):
        raise UnusableData(_absent(dataset, absent[0], data.healthy_class))
    train = recipe.train.model_copy(update={"stages": stages})
    return recipe.model_copy(update={"train": train, "data": _fitted_data(data, ordered, stages)})


def _fitted_stages(stage: StageConfig, labels: list[str], healthy: str) -> list[StageConfig]:
    """The stage with names of classes for HEALTHY and ABNORMAL; one stage for each abnormal class with EACH."""
    abnormal = [label for label in labels if label != healthy]
    if EACH in stage.classes:
        return [
            new
            for label in abnormal
            for new in _fitted_stages(_with_class(stage, label), labels, healthy)
        ]  # fmt: skip
    members = {HEALTHY: [healthy], ABNORMAL: abnormal}
    weights = {name: weight for key, weight in stage.classes.items() for name in members.get(key, [key])}
    names = dict.fromkeys([*labels, *weights])
    changes: dict[str, object] = {"classes": {name: weights[name] for name in names if name in weights}}
    if HEALTHY in _prior_class(stage):
        changes["prior_class"] = healthy
    return [stage.model_copy(update=changes)]


def _with_class(stage: StageConfig, label: str) -> StageConfig:
    weights = {label if key == EACH else key: weight for key, weight in stage.classes.items()}
    slug = re.sub(r"[\W_]+", "-", label.lower())
    return stage.model_copy(update={"name": stage.name.replace(EACH, slug), "classes": weights})


def _prior_class(stage: StageConfig) -> list[str]:
    """The class of the stage's class set, if it has one."""
    return [stage.prior_class] if isinstance(stage, DenoiserConfig) and stage.prior_class else []


def _fitted_data(data: DataConfig, labels: list[str], stages: tuple[StageConfig, ...]) -> DataConfig:
    """Prompts of the classes that the denoiser stages train, and a healthy prompt that is one of them."""
    denoisers = [stage for stage in stages if isinstance(stage, DenoiserConfig)]
    trained = {label for stage in denoisers for label in (*(stage.classes or labels), *_prior_class(stage))}
    prompts = {label: data.prompt(label) for label in labels if label in (trained or labels)}
    healthy = data.healthy_class
    if healthy in prompts and healthy not in data.prompts:  # a class that only the data set names so
        prompts[healthy] = data.healthy_prompt
    changes: dict[str, object] = {"prompts": prompts}
    if healthy in prompts and data.healthy_prompt == DataConfig().healthy_prompt and not agrees(data, prompts):
        changes["healthy_prompt"] = prompts[healthy]
    return data.model_copy(update=changes)


def agrees(data: DataConfig, prompts: Mapping[str, str]) -> bool:
    """Whether the healthy prompt is the one that healthy images are trained under; case does not matter."""
    return prompts.get(data.healthy_class, data.healthy_prompt).casefold() == data.healthy_prompt.casefold()


def described(recipe: Recipe, dataset: Dataset) -> list[str]:
    """What a fitted recipe trains on, in lines for users: classes with their prompts, stages with steps and weights."""
    data, classes = recipe.data, dataset.classes
    lines = [
        f"class {label}{' (healthy)' * (label == data.healthy_class)}: {classes[label]} images, prompt {prompt!r}"
        for label, prompt in data.prompts.items()
    ]
    if others := [label for label in classes if label not in data.prompts]:
        lines.append(f"not trained by the denoiser: {', '.join(others)}")
    for stage in recipe.train.stages:
        weights = ", ".join(f"{label} {weight}" for label, weight in stage.classes.items()) or "all alike"
        lines.append(
            f"stage {stage.name} ({stage.trains}): {stage.steps} steps of {stage.batch_size} images; classes: {weights}"
        )
    lines += [f"caption of {path}: {caption!r}" for path, caption in _example_captions(recipe, dataset)]
    if not agrees(data, data.prompts):
        lines.append(
            f"data.healthy_prompt {data.healthy_prompt!r} is not the prompt of class {data.healthy_class}, "
            f"{data.prompts[data.healthy_class]!r}: no image is trained under the prompt of the counterfactuals"
        )
    return lines


def _example_captions(recipe: Recipe, dataset: Dataset) -> list[tuple[str, str]]:
    """A caption from data of one image of each class, with the image's path; none where captions are not made."""
    config = recipe.data.captions
    if config is None:
        return []
    captions = Captions(config, recipe.data, dataset.store, dataset.images, dataset.shapes)
    first = {image.label: image for image in reversed(dataset.images) if image.label in recipe.data.prompts}
    return [(image.path, image.caption or captions.caption(image, recipe.seed)) for _, image in sorted(first.items())]


def _absent(dataset: Dataset, label: str, healthy: str) -> str:
    names = ", ".join(dataset.classes)
    if label == healthy:
        return (
            f"--data {dataset.store.uri}: no class is known to be healthy; its classes are {names}; name the healthy "
            "one with --healthy-class NAME"
        )
    return (
        f"--data {dataset.store.uri}: no image of class {label!r}, which the recipe trains on; its classes are {names}"
    )
