"""Explains one image without a run: counterfactual, attribution map and metrics under each prompt.

Engine and metrics are those of ``diffva generate``, so equal settings and seeds give equal pixels and numbers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffva_ray._version import __version__
from diffva_ray.config.prompts import texts_of
from diffva_ray.config.recipe import DataConfig, Recipe
from diffva_ray.config.stages import CONDITION
from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.data.bit_depth import check_image_bits
from diffva_ray.data.captions import trained_texts
from diffva_ray.data.conditions import decode_condition
from diffva_ray.data.dataset import UnusableData, companions
from diffva_ray.data.encoding import quantise
from diffva_ray.data.images import BadImage, decode_with_columns, to_square
from diffva_ray.data.masks import read_mask
from diffva_ray.evaluate.factor_scores import factor_answers
from diffva_ray.generate.measures import measure, unit
from diffva_ray.generate.plan import check_settings
from diffva_ray.metrics.factors import FactorClassifier, load_factors
from diffva_ray.metrics.validity import Judge, load_judge
from diffva_ray.model.bundle import load
from diffva_ray.model.card import ModelFolder, UnusableModel
from diffva_ray.progress import LOG
from diffva_ray.provenance import code_revision
from diffva_ray.schema import Image, Mask, record_seed
from diffva_ray.storage.opening import open_file, open_store

MAX_PROMPTS = 24  # rows of one sheet


@dataclass(frozen=True)
class Answer:
    """Result of the image under one prompt."""

    prompt: str  # what the counterfactual should show
    counterfactual: NDArray[np.uint8]  # [size, size], as a run stores it
    signed_map: Image  # [size, size] in [-1, 1]; positive where the image is brighter than its counterfactual
    numbers: dict[str, Any]  # metrics, named as the columns of a run's records; ``factors``: of ``factor_answers``


@dataclass(frozen=True)
class Explanation:
    """An image, its masks, and an answer for each prompt."""

    image: Image  # [size, size] in [0, 1], as the model sees it
    lungs: Mask | None  # lung mask [size, size] beside the image
    lesion: Mask | None  # lesion mask [size, size] beside the image
    answers: list[Answer]  # one per prompt
    about: dict[str, Any]  # image, model, settings, seed, code

    def as_dict(self) -> dict[str, Any]:
        """All but the pixels, ready for JSON: the keys of ``about``, and ``answers`` with one dictionary per prompt."""
        return {**self.about, "answers": [answer.numbers for answer in self.answers]}


def explain(
    image: str,
    model: str,
    recipe: Recipe,
    prompts: Sequence[str] = (),
    device: str | None = None,
    conditions: Mapping[str, str] = MappingProxyType({}),
) -> Explanation:
    """Explain one image (local or ``s3://``) under each prompt, by default the recipe's healthy one. ``conditions``:
    paths of condition images by column ``condition.NAME``.

    The seed is ``record_seed(recipe.seed, <file name>, 0)``, as in a run with the image at its data root. All prompts
    share it. Raises UnusableData for an image or prompts that cannot be used, or if the networks give NaN or infinity;
    UnusableModel; PlanError for settings that cannot generate any image."""
    config = recipe.generate
    prompts = list(dict.fromkeys(prompts)) or [recipe.data.healthy_prompt]
    for prompt in prompts:
        check_settings(config, {}, prompt)
    if len(prompts) > MAX_PROMPTS:
        raise UnusableData(f"{len(prompts)} prompts; a sheet has room for {MAX_PROMPTS}")

    # Read the image and its masks, load the model.
    data, pixels, columns = open_image(image, config.min_side, recipe.data.bits)
    engine, judge = open_model(model, recipe, prompts, device)
    factors = factors_of(model)
    name = image.rpartition("/")[2]
    seed = record_seed(recipe.seed, name, 0)
    square = to_square(pixels, engine.size)
    lungs, lesion = (mask_beside(image, kind, engine.size) for kind in ("masks", "lesions"))
    own, digests = condition_images(engine, conditions, pixels.shape)

    # Generate and measure, a micro-batch of prompts at a time.
    answers: list[Answer] = []
    for start in range(0, len(prompts), config.micro_batch):
        batch = prompts[start : start + config.micro_batch]
        count = len(batch)
        result = engine([square] * count, [seed] * count, batch, lungs=[lungs] * count, conditions=[own] * count)
        if not (np.isfinite(result.counterfactuals).all() and np.isfinite(result.reconstructions).all()):
            raise UnusableData(f"{image}: the networks gave NaN or infinity for this image")
        for prompt, counterfactual, reconstruction, source_prompt in zip(
            batch, result.counterfactuals, result.reconstructions, result.source_prompts
        ):
            answer = answer_of(square, lungs, counterfactual, reconstruction, prompt, source_prompt, recipe, judge)
            add_factors(answer, square, factors, recipe.data)
            answers.append(answer)
    about = {**origin(image, data, model, engine, recipe, seed), **described(pixels, columns), **digests}
    return Explanation(square, lungs, lesion, answers, about)


def condition_images(
    engine: CounterfactualEngine, paths: Mapping[str, str], shape: tuple[int, ...]
) -> tuple[dict[str, Image], dict[str, Any]]:
    """The condition images [3, size, size] that the engine's method reads, by column, and their digests for the sheet.

    Raises UnusableData for one that is not given, is not read, or does not lie on an image of ``shape``.
    """
    read = engine.condition_columns()
    names = [column.removeprefix(CONDITION) for column in (*paths, *read)]
    for name in names:
        if CONDITION + name not in read:
            listed = ", ".join(names[len(paths) :]) or "none"
            raise UnusableData(f"--condition {name}: the method reads no such condition image (it reads {listed})")
        if CONDITION + name not in paths:
            raise UnusableData(f"the model's ControlNet reads a condition image {name!r}; give --condition {name}=FILE")
    images, digests = {}, {}
    for column, path in paths.items():
        store, file = open_file(path)
        try:
            data = store.read(file)
            images[column] = decode_condition(data, engine.size, (shape[0], shape[1]))
        except (OSError, BadImage) as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else error
            raise UnusableData(f"--condition {path}: {reason}") from None
        digests[column] = {"path": path, "sha256": hashlib.sha256(data).hexdigest()}
    return images, {"conditions": digests} if digests else {}


def described(pixels: Image, columns: Mapping[str, str]) -> dict[str, Any]:
    """Size, view and spacing of an image."""
    height, width = pixels.shape
    return {"width": width, "height": height, "view": columns.get("view", ""), "spacing": columns.get("spacing", "")}


def origin(
    image: str, data: bytes, model: str, engine: CounterfactualEngine, recipe: Recipe, seed: int
) -> dict[str, Any]:
    """Provenance of a sheet or a strip: image, model, settings, seed, code."""
    return {
        "image": image,
        "image_sha256": hashlib.sha256(data).hexdigest(),
        "model": model,
        "model_digest": engine.bundle.digest,
        "trained_on": engine.bundle.card.get("data_kind"),
        "measured": engine.bundle.card.get("measured"),
        "recipe": recipe.name,
        "settings": recipe.generate.model_dump(mode="json"),
        "run_seed": recipe.seed,
        "seed": seed,
        "device": engine.device.type,
        "diffva_ray": __version__,
        "code_revision": code_revision(),
    }


def open_model(
    model: str, recipe: Recipe, prompts: Sequence[str], device: str | None = None
) -> tuple[CounterfactualEngine, Judge | None]:
    """The engine of the model at ``model``, and its judge if it has one. Raises UnusableModel, and UnusableData for a
    prompt that is too long."""
    bundle = load(model, recipe)
    engine = CounterfactualEngine(bundle, recipe.generate, device)
    for prompt in prompts:
        if not engine.fits(prompt):
            raise UnusableData(f"--prompt {prompt!r}: more than {bundle.tokenizer.model_max_length} tokens")
    for note in ModelFolder(model).prompt_notes(
        [text for prompt in prompts for text in texts_of(prompt)], trained_texts(recipe.data)
    ):
        LOG.info("%s", note)
    try:
        return engine, load_judge(open_store(model))
    except ValueError as error:
        raise UnusableModel(str(error)) from None


def factors_of(model: str) -> FactorClassifier | None:
    """The factor classifier of the model at ``model``, None without one. Raises UnusableModel."""
    try:
        return load_factors(open_store(model))
    except ValueError as error:
        raise UnusableModel(str(error)) from None


def add_factors(answer: Answer, image: Image, classifier: FactorClassifier | None, data: DataConfig) -> None:
    """Add what the classifier says of the image and the counterfactual to the numbers of an answer."""
    after = unit(answer.counterfactual)
    answer.numbers["factors"] = factor_answers(
        classifier, image, after, answer.prompt, data.prompts, data.healthy_class
    )


def open_image(image: str, min_side: int, bits: int = 16) -> tuple[bytes, Image, dict[str, str]]:
    """Bytes of the image at a path (local or ``s3://``), its pixels [H, W] in [0, 1], and the columns of a DICOM
    header. Raises UnusableData."""
    store, name = open_file(image)
    if not name:
        raise UnusableData(f"IMAGE {image!r}: names no file")
    try:
        data = store.read(name)
        check_image_bits(data, bits, image)
        pixels, _, columns = decode_with_columns(data, None, min_side, bits)
        return data, pixels, columns
    except IsADirectoryError:
        raise UnusableData(f"{image}: a folder; explain takes one image") from None
    except (FileNotFoundError, NotADirectoryError):
        raise UnusableData(f"{image}: no such file") from None
    except OSError as error:
        raise UnusableData(f"{image}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:  # BadImage, an unknown scheme, a path that leaves its folder
        raise UnusableData(f"{image}: {error}" if isinstance(error, BadImage) else str(error)) from None


def mask_beside(image: str, kind: str, size: int) -> Mask | None:
    """Mask [size, size] of the image at a path, by a run's rules (``companions``); None without one."""
    for path in companions(image, kind):
        store, name = open_file(path)
        mask = read_mask(store, name, size)
        if mask is not None:
            return mask
    return None


def answer_of(
    image: Image,
    lungs: Mask | None,
    counterfactual: Image,
    reconstruction: Image,
    prompt: str,
    source_prompt: str,
    recipe: Recipe,
    judge: Judge | None,
) -> Answer:
    """Measure the 8-bit images, as for a run's records, and make the numbers ready for JSON."""
    stored = quantise(counterfactual)
    metrics, signed_map = measure(image, stored, quantise(reconstruction), lungs, recipe.generate, judge)
    numbers: dict[str, Any] = {"prompt": prompt, "source_prompt": source_prompt, **metrics}
    if not math.isfinite(metrics["psnr"]):  # JSON has no infinity, which equal images have
        numbers["psnr"] = None
    del numbers["reconstruction_sha256"]  # the sheet does not keep the reconstruction
    return Answer(prompt, stored, signed_map, numbers)
