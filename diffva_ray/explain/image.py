"""One image, at once: its counterfactual under each prompt, the map, the numbers, and a sheet that shows them.

The engine and the measures are those of ``diffva generate``, so equal settings and seeds give equal pixels and numbers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffva_ray._version import __version__
from diffva_ray.config.recipe import Recipe
from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.data.dataset import UnusableData, companions
from diffva_ray.data.encoding import quantise
from diffva_ray.data.images import BadImage, check_contrast, decode, read_mask, to_square
from diffva_ray.evaluate.direction import induces
from diffva_ray.generate.measures import measure
from diffva_ray.generate.plan import check_settings
from diffva_ray.metrics.validity import Judge, load_judge
from diffva_ray.model.bundle import load
from diffva_ray.model.card import UnusableModel
from diffva_ray.provenance import code_revision
from diffva_ray.schema import Image, Mask, record_seed
from diffva_ray.storage.store import open_file, open_store

MOST_PROMPTS = 24  # rows of one sheet


@dataclass(frozen=True)
class Answer:
    """What the model makes of the image under one prompt; images [size, size]. ``numbers`` are named as the columns of
    a run's records."""

    prompt: str
    counterfactual: NDArray[np.uint8]  # as a run stores it
    signed_map: Image  # in [-1, 1]; positive where the image is brighter than its counterfactual
    inducing: bool  # the prompt names a finding, so red is -M
    numbers: dict[str, Any]


@dataclass(frozen=True)
class Explanation:
    """An image, what lies beside it, and an answer for each prompt. ``about``: image, model, settings, seed, code."""

    image: Image  # [size, size] in [0, 1], as the model sees it
    lungs: Mask | None
    lesion: Mask | None
    answers: list[Answer]
    about: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Everything but the pixels, ready for JSON: ``about``'s keys and ``answers``, one dictionary per prompt."""
        return {**self.about, "answers": [answer.numbers for answer in self.answers]}


def explain(
    image: str, model: str, recipe: Recipe, prompts: Sequence[str] = (), device: str | None = None
) -> Explanation:
    """Generate the image at ``image`` (local or ``s3://``) with the model at ``model``, once for each prompt; without
    prompts once, for the recipe's healthy prompt.

    The seed is ``record_seed(recipe.seed, <file name>, 0)``: the one a run would use if the image lay at its data root.
    All prompts share it. Raises UnusableData (no such file, not an image, too small, a prompt that is too long),
    UnusableModel, and PlanError for settings that no image could be generated with.
    """
    config = recipe.generate
    check_settings(config, {})
    asked = list(dict.fromkeys(prompts)) or [recipe.data.healthy_prompt]
    if len(asked) > MOST_PROMPTS:
        raise UnusableData(f"{len(asked)} prompts; a sheet has room for {MOST_PROMPTS}")
    data, pixels = open_image(image, config.min_side, recipe.data.bits)
    engine, judge = open_model(model, recipe, asked, device)
    name = image.rpartition("/")[2]
    seed = record_seed(recipe.seed, name, 0)
    square = to_square(pixels, engine.size)
    lungs, lesion = (mask_beside(image, kind, engine.size) for kind in ("masks", "lesions"))
    answers: list[Answer] = []
    for start in range(0, len(asked), config.micro_batch):
        some = asked[start : start + config.micro_batch]
        count = len(some)
        counterfactuals = engine(
            [square] * count, [engine.settings(prompt) for prompt in some], [seed] * count, [lungs] * count
        )
        if not (
            np.isfinite(counterfactuals.counterfactuals).all() and np.isfinite(counterfactuals.reconstructions).all()
        ):
            raise UnusableData(f"{image}: the networks gave NaN or infinity for this image")
        for prompt, generated, rebuilt, shown in zip(
            some, counterfactuals.counterfactuals, counterfactuals.reconstructions, counterfactuals.source_prompts
        ):
            answers.append(_answer(square, lungs, generated, rebuilt, prompt, shown, recipe, judge))
    size = {"width": pixels.shape[1], "height": pixels.shape[0]}
    return Explanation(square, lungs, lesion, answers, {**origin(image, data, model, engine, recipe, seed), **size})


def origin(
    image: str, data: bytes, model: str, engine: CounterfactualEngine, recipe: Recipe, seed: int
) -> dict[str, Any]:
    """What a sheet or a strip is made of: image, model, settings, seed, code."""
    return {
        "image": image,
        "image_sha256": hashlib.sha256(data).hexdigest(),
        "model": model,
        "model_digest": engine.bundle.digest,
        "trained_on": engine.bundle.card.get("data_kind"),
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
    """The engine of the model at ``model`` and its judge, where it has one. Raises UnusableModel, and UnusableData for
    a prompt that is too long."""
    bundle = load(model, recipe)
    engine = CounterfactualEngine(bundle, recipe.generate, device)
    for prompt in prompts:
        if not engine.fits(prompt):
            raise UnusableData(f"--prompt {prompt!r}: more than {bundle.tokenizer.model_max_length} tokens")
    try:
        return engine, load_judge(open_store(model))
    except ValueError as error:
        raise UnusableModel(str(error)) from None


def open_image(image: str, min_side: int, bits: int = 16) -> tuple[bytes, Image]:
    """The bytes of the image at a path (local or ``s3://``), and its pixels [H, W] in [0, 1]. Raises UnusableData."""
    store, name = open_file(image)
    if not name:
        raise UnusableData(f"IMAGE {image!r}: names no file")
    try:
        data = store.read(name)
        pixels = decode(data, min_side, bits)
        check_contrast(pixels)
        return data, pixels
    except IsADirectoryError:
        raise UnusableData(f"{image}: a folder; explain takes one image") from None
    except (FileNotFoundError, NotADirectoryError):
        raise UnusableData(f"{image}: no such file") from None
    except OSError as error:
        raise UnusableData(f"{image}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:  # BadImage, an unknown scheme, a path that leaves its folder
        raise UnusableData(f"{image}: {error}" if isinstance(error, BadImage) else str(error)) from None


def mask_beside(image: str, kind: str, size: int) -> Mask | None:
    """The mask [size, size] of the image at a path, found as a run finds it (``companions``); None without one."""
    for path in companions(image, kind):
        store, name = open_file(path)
        mask = read_mask(store, name, size)
        if mask is not None:
            return mask
    return None


def _answer(
    image: Image,
    lungs: Mask | None,
    generated: Image,
    rebuilt: Image,
    prompt: str,
    shown: str,
    recipe: Recipe,
    judge: Judge | None,
) -> Answer:
    """Measured on the 8-bit images, as a run's records are."""
    counterfactual = quantise(generated)
    found, signed = measure(image, counterfactual, quantise(rebuilt), lungs, recipe.generate, judge)
    numbers = {"prompt": prompt, "source_prompt": shown, **found}
    for name in ("judge_image", "judge_counterfactual"):  # JSON knows no numpy
        numbers[name] = None if found[name] is None else float(found[name])
    if not math.isfinite(found["psnr"]):  # nor infinity; only equal images have it
        numbers["psnr"] = None
    del numbers["reconstruction_sha256"]  # the sheet does not keep the reconstruction
    return Answer(prompt, counterfactual, signed, induces(prompt, recipe.data), numbers)
