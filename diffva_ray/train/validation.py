"""A look at the model while it trains: counterfactuals of a fixed set of images, scored against their lesions, and a
picture."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffva_ray.config.recipe import Recipe
from diffva_ray.counterfactual.attribution import attribution
from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.data.dataset import UnusableData
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.encoding import quantise
from diffva_ray.data.images import decode_mask, decode_square
from diffva_ray.data.phantoms import ALL_CLASSES, phantom
from diffva_ray.metrics.localization import positive, score
from diffva_ray.model.bundle import Bundle
from diffva_ray.schema import Image
from diffva_ray.train.logger import TrainingLogger

PHANTOM_SEED = 9001  # of no training, validation or test set of the demo


@dataclass(frozen=True)
class Case:
    """An abnormal image [size, size] in [0, 1], its lesion and its lungs (None: not known)."""

    image: Image
    lesion: NDArray[np.bool_]
    lungs: NDArray[np.bool_] | None


def validation_of(recipe: Recipe) -> Callable[[Bundle, TrainingLogger, str, int], None] | None:
    """What the training loop is to call; None when the recipe asks for no validation. Raises UnusableData."""
    if not recipe.train.validation.every:
        return None
    cases = _cases(recipe)

    def validate(bundle: Bundle, logger: TrainingLogger, stage: str, step: int) -> None:
        scores, picture = look(bundle, cases)
        logger.log(stage, step, {f"validation_{name}": value for name, value in scores.items()}, last=False)
        logger.image("image, counterfactual, attribution", picture, stage, step)

    return validate


def look(bundle: Bundle, cases: list[Case]) -> tuple[dict[str, float], NDArray[np.uint8]]:
    """Scores of the recipe's own method (AUROC, best Dice of the map's positive part in lungs or lesion; mean |map|),
    and a picture [rows, 3 columns, RGB]. Works on a copy of the networks; threads and training stay as they were."""
    threads, config = torch.get_num_threads(), bundle.recipe.generate
    extras: dict[str, Any] = {name: copy.deepcopy(network) for name, network in bundle.extras.items()}
    networks: dict[str, Any] = {name: copy.deepcopy(network) for name, network in bundle.modules.items()}
    device = next(bundle.unet.parameters()).device.type
    engine = CounterfactualEngine(replace(bundle, extras=extras, **networks), config, device)
    scores: list[tuple[float, float]] = []
    rows, change = [], []
    for start in range(0, len(cases), config.micro_batch):
        some = cases[start : start + config.micro_batch]
        settings = [engine.settings()] * len(some)
        seeds = [start + n for n in range(len(some))]
        counterfactuals = engine([case.image for case in some], settings, seeds, [case.lungs for case in some])
        for case, counterfactual, rebuilt in zip(
            some, counterfactuals.counterfactuals, counterfactuals.reconstructions, strict=True
        ):
            signed = attribution(case.image, rebuilt, counterfactual, config)
            region = None if case.lungs is None else case.lungs | case.lesion
            found = score(positive(signed), case.lesion, region)
            if found is not None:
                scores.append((found.auroc, found.dice_best))
            change.append(float(np.abs(signed).mean()))
            rows.append(np.concatenate([case.image, counterfactual, np.clip(0.5 + 2 * signed, 0, 1)], axis=1))
    torch.set_num_threads(threads)
    auroc, dice = np.mean(scores, axis=0) if scores else (float("nan"), float("nan"))
    grey = quantise(np.concatenate(rows[:8]).astype(np.float32))
    numbers = {"auroc": float(auroc), "dice_best": float(dice), "change": float(np.mean(change))}
    return numbers, np.repeat(grey[..., None], 3, axis=2)


def _cases(recipe: Recipe) -> list[Case]:
    config, size = recipe.train.validation, recipe.model.resolution
    abnormal = [label for label in recipe.data.prompts if label != recipe.data.healthy_class]
    if config.data is None:
        known = [label for label in abnormal if label in ALL_CLASSES]
        if not known:
            raise UnusableData("train.validation: no class of the recipe has phantoms; give train.validation.data")
        made = [phantom(known[n % len(known)], n, PHANTOM_SEED, size) for n in range(config.images)]
        return [Case(one.image, one.lesion, one.lungs) for one in made]
    dataset = open_dataset(config.data, recipe.data)
    images = [image for image in dataset.images if image.label in abnormal and image.lesion_mask]
    if not images:
        raise UnusableData(f"train.validation.data {config.data}: no abnormal image there has a lesion mask")
    cases = []
    for image in images[:: max(1, len(images) // config.images)][: config.images]:
        pixels = decode_square(dataset.store.read(image.path), size, bits=dataset.bits)[0]
        lungs = decode_mask(dataset.store.read(image.lung_mask), size) if image.lung_mask else None
        cases.append(Case(pixels, decode_mask(dataset.store.read(image.lesion_mask), size), lungs))
    return cases
