"""Validation during training: generates counterfactuals of a fixed set of images, scores their attribution maps against
the lesion masks, and logs some of them as an image."""

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

PHANTOM_SEED = 9001  # used by no training, validation or test set of the demo


@dataclass(frozen=True)
class Case:
    """An abnormal image and its masks."""

    image: Image  # [size, size] in [0, 1]
    lesion: NDArray[np.bool_]  # [size, size]
    lungs: NDArray[np.bool_] | None  # [size, size]; None if unknown


def validation_of(recipe: Recipe) -> Callable[[Bundle, TrainingLogger, str, int], None] | None:
    """Return the validation for the training loop, None if the recipe has none. Raises UnusableData if there are no
    images with lesions."""
    if not recipe.train.validation.every:
        return None
    cases = _cases(recipe)

    def validate(bundle: Bundle, logger: TrainingLogger, stage: str, step: int) -> None:
        scores, panels = score_cases(bundle, cases)
        logger.log(stage, step, {f"validation_{name}": value for name, value in scores.items()}, last=False)
        logger.image("image, counterfactual, attribution", panels, stage, step)

    return validate


def score_cases(bundle: Bundle, cases: list[Case]) -> tuple[dict[str, float], NDArray[np.uint8]]:
    """Generate and score the cases with the recipe's own method, on a copy of the networks.

    Returns the scores (AUROC and best Dice of the map's positive part, within lungs and lesion; mean |map|), and an RGB
    image with one row for each of the first 8 cases: image, counterfactual, attribution map.
    """
    # Build an engine on copies, so that training is not affected.
    threads, config = torch.get_num_threads(), bundle.recipe.generate
    extras: dict[str, Any] = {name: copy.deepcopy(network) for name, network in bundle.extras.items()}
    networks: dict[str, Any] = {name: copy.deepcopy(network) for name, network in bundle.modules.items()}
    device = next(bundle.unet.parameters()).device.type
    engine = CounterfactualEngine(replace(bundle, extras=extras, **networks), config, device)

    # Generate and score batch by batch.
    scores: list[tuple[float, float]] = []
    rows, change = [], []
    for start in range(0, len(cases), config.micro_batch):
        batch = cases[start : start + config.micro_batch]
        seeds = [start + n for n in range(len(batch))]
        output = engine([case.image for case in batch], seeds, lungs=[case.lungs for case in batch])
        images = zip(batch, output.counterfactuals, output.reconstructions, strict=True)
        for case, counterfactual, reconstruction in images:
            signed = attribution(case.image, reconstruction, counterfactual, config)
            region = case.lungs
            localization = score(positive(signed), case.lesion, region)
            if localization is not None:
                scores.append((localization.auroc, localization.dice_best))
            change.append(float(np.abs(signed).mean()))
            rows.append(np.concatenate([case.image, counterfactual, np.clip(0.5 + 2 * signed, 0, 1)], axis=1))
    torch.set_num_threads(threads)  # the engine sets its own number

    # Summarize.
    auroc, dice = np.mean(scores, axis=0) if scores else (float("nan"), float("nan"))
    grey = quantise(np.concatenate(rows[:8]).astype(np.float32))
    numbers = {"auroc": float(auroc), "dice_best": float(dice), "change": float(np.mean(change))}
    return numbers, np.repeat(grey[..., None], 3, axis=2)


def _cases(recipe: Recipe) -> list[Case]:
    """The abnormal images to validate on: of ``train.validation.data``, or phantoms."""
    config, size = recipe.train.validation, recipe.model.resolution
    abnormal = [label for label in recipe.data.prompts if label != recipe.data.healthy_class]
    if config.data is None:
        labels = [label for label in abnormal if label in ALL_CLASSES]
        if not labels:
            raise UnusableData("train.validation: no class of the recipe has phantoms; set train.validation.data")
        phantoms = [phantom(labels[n % len(labels)], n, PHANTOM_SEED, size) for n in range(config.images)]
        return [Case(case.image, case.lesion, case.lungs) for case in phantoms]

    # Spread the choice evenly over all abnormal images with a lesion mask.
    dataset = open_dataset(config.data, recipe.data)
    images = [image for image in dataset.images if image.label in abnormal and image.lesion_mask]
    if not images:
        raise UnusableData(
            f"train.validation.data {config.data}: no abnormal image has a lesion mask, which validation needs"
        )
    cases = []
    for image in images[:: max(1, len(images) // config.images)][: config.images]:
        pixels = decode_square(dataset.store.read(image.path), size, bits=dataset.bits)[0]
        lungs = decode_mask(dataset.store.read(image.lung_mask), size) if image.lung_mask else None
        cases.append(Case(pixels, decode_mask(dataset.store.read(image.lesion_mask), size), lungs))
    return cases
