"""One film, at once: its twin under each prompt, the map, the numbers, and a sheet that shows them.

The engine and the measures are those of ``diffva generate``, so equal settings and seeds give equal pixels and numbers.
"""

from __future__ import annotations

import hashlib
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from diffva_ray import __version__
from diffva_ray.arrays import Image, Mask
from diffva_ray.config import GUESS, Recipe
from diffva_ray.counterfactual.engine import Counterfactuals
from diffva_ray.data.encoding import quantise
from diffva_ray.data.films import UnusableData, companions
from diffva_ray.data.images import BadImage, check_contrast, decode, to_square
from diffva_ray.evaluate.direction import induces
from diffva_ray.evaluate.drawing import INK, MUTED, Scale, colour_bar, colour_limit, diverging, outline, overlay, png
from diffva_ray.generate.measures import measure, unit
from diffva_ray.generate.plan import check_settings
from diffva_ray.generate.shard import read_mask
from diffva_ray.metrics.validity import Judge, load_judge
from diffva_ray.model.bundle import load
from diffva_ray.model.card import UnusableModel
from diffva_ray.provenance import code_revision
from diffva_ray.schema import record_seed
from diffva_ray.storage import open_file, open_store

MOST_PROMPTS = 24  # rows of one sheet
RED_ABOVE = 0.05  # a quantile of the film's own map would paint a healthy film, too
LEAST_LIMIT = 0.1  # a map of nearly nothing looks like nearly nothing
PANEL, GAP, LEFT, TOP, LINE = 2.15, 0.06, 1.95, 0.66, 0.15  # inches


@dataclass(frozen=True)
class Answer:
    """What the model makes of the film under one prompt; images [size, size]. ``numbers`` are named as the columns of
    a run's records."""

    prompt: str
    counterfactual: NDArray[np.uint8]  # as a run stores it
    signed_map: Image  # in [-1, 1]; positive where the film is brighter than its twin
    inducing: bool  # the prompt names a finding, so red is -M
    numbers: dict[str, Any]


@dataclass(frozen=True)
class Explanation:
    """A film, what lies beside it, and an answer for each prompt. ``about``: film, model, settings, seed, code."""

    film: Image  # [size, size] in [0, 1], as the model sees it
    lungs: Mask | None
    lesion: Mask | None
    answers: list[Answer]
    about: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Everything but the pixels, ready for JSON: ``about``'s keys and ``answers``, one dictionary per prompt."""
        return {**self.about, "answers": [answer.numbers for answer in self.answers]}


def explain(
    film: str, model: str, recipe: Recipe, prompts: Sequence[str] = (), device: str | None = None
) -> Explanation:
    """Heal the film at ``film`` (local or ``s3://``) with the model at ``model``, once for each prompt; without prompts
    once, for the recipe's healthy prompt.

    The seed is ``record_seed(recipe.seed, <file name>, 0)``: the one a run would use if the film lay at its data root.
    All prompts share it. Raises UnusableData (no such file, not an image, too small, a prompt that is too long),
    UnusableModel, and PlanError for settings that no film could be generated with.
    """
    config = recipe.generate
    check_settings(config, {})
    asked = list(dict.fromkeys(prompts)) or [recipe.data.healthy_prompt]
    if len(asked) > MOST_PROMPTS:
        raise UnusableData(f"{len(asked)} prompts; a sheet has room for {MOST_PROMPTS}")
    data, pixels = open_film(film, config.min_side, recipe.data.bits)
    engine, judge = open_model(model, recipe, asked, device)
    name = film.rpartition("/")[2]
    seed = record_seed(recipe.seed, name, 0)
    square = to_square(pixels, engine.size)
    lungs, lesion = (mask_beside(film, kind, engine.size) for kind in ("masks", "lesions"))
    answers: list[Answer] = []
    for start in range(0, len(asked), config.micro_batch):
        some = asked[start : start + config.micro_batch]
        count = len(some)
        twins = engine([square] * count, [engine.settings(prompt) for prompt in some], [seed] * count, [lungs] * count)
        if not (np.isfinite(twins.counterfactuals).all() and np.isfinite(twins.reconstructions).all()):
            raise UnusableData(f"{film}: the networks gave NaN or infinity for this film")
        for prompt, healed, rebuilt, shown in zip(some, twins.counterfactuals, twins.reconstructions, twins.sources):
            answers.append(_answer(square, lungs, healed, rebuilt, prompt, shown, recipe, judge))
    size = {"width": pixels.shape[1], "height": pixels.shape[0]}
    return Explanation(square, lungs, lesion, answers, {**origin(film, data, model, engine, recipe, seed), **size})


def origin(film: str, data: bytes, model: str, engine: Counterfactuals, recipe: Recipe, seed: int) -> dict[str, Any]:
    """What a sheet or a strip is made of: film, model, settings, seed, code."""
    return {
        "film": film,
        "source_sha256": hashlib.sha256(data).hexdigest(),
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
) -> tuple[Counterfactuals, Judge | None]:
    """The engine of the model at ``model`` and its judge, where it has one. Raises UnusableModel, and UnusableData for
    a prompt that is too long."""
    bundle = load(model, recipe)
    engine = Counterfactuals(bundle, recipe.generate, device)
    for prompt in prompts:
        if not engine.fits(prompt):
            raise UnusableData(f"--prompt {prompt!r}: more than {bundle.tokenizer.model_max_length} tokens")
    try:
        return engine, load_judge(open_store(model))
    except ValueError as error:
        raise UnusableModel(str(error)) from None


def open_film(film: str, min_side: int, bits: int = 16) -> tuple[bytes, Image]:
    """The bytes of the film at a path (local or ``s3://``), and its pixels [H, W] in [0, 1]. Raises UnusableData."""
    store, name = open_file(film)
    if not name:
        raise UnusableData(f"FILM {film!r}: names no file")
    try:
        data = store.read(name)
        pixels = decode(data, min_side, bits)
        check_contrast(pixels)
        return data, pixels
    except IsADirectoryError:
        raise UnusableData(f"{film}: a folder; explain takes one film") from None
    except (FileNotFoundError, NotADirectoryError):
        raise UnusableData(f"{film}: no such file") from None
    except OSError as error:
        raise UnusableData(f"{film}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:  # BadImage, an unknown scheme, a path that leaves its folder
        raise UnusableData(f"{film}: {error}" if isinstance(error, BadImage) else str(error)) from None


def mask_beside(film: str, kind: str, size: int) -> Mask | None:
    """The mask [size, size] of the film at a path, found as a run finds it (``companions``); None without one."""
    for path in companions(film, kind):
        store, name = open_file(path)
        mask = read_mask(store, name, size)
        if mask is not None:
            return mask
    return None


def _answer(
    film: Image,
    lungs: Mask | None,
    healed: Image,
    rebuilt: Image,
    prompt: str,
    shown: str,
    recipe: Recipe,
    judge: Judge | None,
) -> Answer:
    """Measured on the 8-bit images, as a run's records are."""
    counterfactual = quantise(healed)
    found, signed = measure(film, counterfactual, quantise(rebuilt), lungs, recipe.generate, judge)
    numbers = {"prompt": prompt, "source_prompt": shown, **found}
    for name in ("judge_source", "judge_counterfactual"):  # JSON knows no numpy
        numbers[name] = None if found[name] is None else float(found[name])
    if not math.isfinite(found["psnr"]):  # nor infinity; only equal images have it
        numbers["psnr"] = None
    del numbers["reconstruction_sha256"]  # the sheet does not keep the reconstruction
    return Answer(prompt, counterfactual, signed, induces(prompt, recipe.data), numbers)


def write_sheet(explanation: Explanation, path: str) -> None:
    """Draw the sheet and write it to ``path`` (a .png, local or ``s3://``). Raises UnusableData for another ending,
    StoreError where it cannot be written."""
    write_png(sheet(explanation), path)


def write_png(picture: bytes, path: str) -> None:
    """Put a drawn sheet at ``path``; raises as ``write_sheet``."""
    check_sheet(path)
    store, name = open_file(path)
    store.put(name, picture)


def check_sheet(path: str) -> None:
    """Raises UnusableData unless ``path`` can be the name of a sheet."""
    if not path.lower().endswith(".png"):
        raise UnusableData(f"--out {path}: the sheet is a .png")


def sheet(explanation: Explanation) -> bytes:
    """PNG in the manner of a run's figures: a row per prompt with the film, its twin, the red overlay and the signed
    map; the outline of the lesion where its mask lies beside the film."""
    answers = explanation.answers
    limit = colour_limit(np.concatenate([answer.signed_map.ravel() for answer in answers]), LEAST_LIMIT)
    scale = Scale(RED_ABOVE, "fixed", limit)
    columns = ("film", "twin", "red overlay", "signed map")
    width = LEFT + len(columns) * (PANEL + GAP) + 0.18
    lines = [line for part in _footer(explanation, scale) for line in textwrap.wrap(part, int(width * 18.5))]
    foot = 0.74 + LINE * len(lines)
    height = TOP + len(answers) * (PANEL + GAP) + foot
    figure = Figure(figsize=(width, height), facecolor="white")
    figure.text(0.12 / width, 1 - 0.22 / height, short_path(explanation.about["film"]), fontsize=10, color=INK,
                weight="bold", va="center", parse_math=False)  # fmt: skip
    for row, answer in enumerate(answers):
        bottom = height - TOP - row * (PANEL + GAP) - PANEL
        _side(figure, answer, 0.12 / width, bottom + PANEL, height)
        healed = unit(answer.counterfactual)
        red = (-1 if answer.inducing else 1) * answer.signed_map
        pictures = (
            explanation.film,
            healed,
            overlay(explanation.film, red, scale.threshold, explanation.lungs),
            diverging(answer.signed_map, scale.limit),
        )
        for column, (title, picture) in enumerate(zip(columns, pictures)):
            left = (LEFT + column * (PANEL + GAP)) / width
            axes = figure.add_axes((left, bottom / height, PANEL / width, PANEL / height))
            axes.set_axis_off()
            axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="bicubic")
            if column >= 2:
                outline(axes, explanation.lesion)
            if row == 0:
                axes.set_title(title, fontsize=8.5, color=INK, pad=4)
    colour_bar(figure, scale, (LEFT + 3 * (PANEL + GAP)) / width, (foot - 0.17) / height, PANEL / width, height)
    figure.text(0.12 / width, 0.32 / height, "\n".join(lines), fontsize=7, color=MUTED, va="bottom", linespacing=1.45,
                parse_math=False)  # fmt: skip
    figure.text(0.12 / width, 0.14 / height, "Not for clinical use.", fontsize=7.5, color=INK, weight="bold",
                va="bottom")  # fmt: skip
    return png(figure)


def _side(figure: Figure, answer: Answer, x: float, top: float, height: float) -> None:
    """Prompt and numbers at the left of a row whose panels end ``top`` inches above the figure's foot."""
    prompt = textwrap.wrap(f"“{answer.prompt}”", 25)
    if len(prompt) > 4:
        prompt = [*prompt[:3], prompt[3][:23] + "…”"]
    figure.text(x, (top - 0.02) / height, "\n".join(prompt), fontsize=8, color=INK, weight="bold", va="top",
                linespacing=1.35, parse_math=False)  # fmt: skip
    below = top - 0.12 - 0.155 * len(prompt)
    figure.text(x, below / height, "\n".join(said(answer)), fontsize=7.5, color=MUTED, va="top", linespacing=1.55,
                parse_math=False)  # fmt: skip


def said(answer: Answer) -> list[str]:
    """The numbers of one answer, a line each."""
    numbers = answer.numbers
    ratio = "equal images" if numbers["psnr"] is None else f"{numbers['psnr']:.1f} dB"
    lines = [
        f"SSIM {numbers['ssim']:.3f}",
        f"MS-SSIM {numbers['ms_ssim']:.3f} ({numbers['ms_ssim_scales']} scales)",
        f"PSNR {ratio} · L1 {numbers['l1']:.3f}",
        f"map energy {numbers['map_energy']:.4f}",
    ]
    if numbers["map_energy_lung_fraction"] is not None:
        lines.append(f"of it in the lungs {numbers['map_energy_lung_fraction']:.0%}")
    if numbers["judge_source"] is not None:
        lines.insert(0, f"healthy {numbers['judge_source']:.2f} → {numbers['judge_counterfactual']:.2f}")
    if numbers["source_prompt"]:
        lines.append(f"taken to show “{numbers['source_prompt']}”")
    return lines


def _footer(explanation: Explanation, scale: Scale) -> list[str]:
    about, config = explanation.about, explanation.about["settings"]
    signs = dict.fromkeys("−M" if answer.inducing else "M" for answer in explanation.answers)
    red = " or ".join(signs) + f" > {scale.threshold:g}"
    if "−M" in signs:
        red += " (−M where the prompt asks for a finding)"
    legend = [f"M: {_difference(config)}; red: {red}{', inside the lungs' if explanation.lungs is not None else ''}"]
    if explanation.lesion is not None:
        legend.append("outline: the lesion mask beside the film")
    if explanation.answers[0].numbers["judge_source"] is not None:
        legend.append("healthy: the probability that the model's judge gives film → twin")
    if config["source_prompt"] == GUESS and not all(answer.numbers["source_prompt"] for answer in explanation.answers):
        legend.append("the model takes the film for healthy")
    settings = [
        f"{about['width']} × {about['height']} px, seen at {len(explanation.film)}",
        config["method"],
        f"strength {config['strength']:g}",
        f"guidance {config['guidance_scale']:g}",
        f"{config['num_inference_steps']} steps",
        f"scheduler {config['scheduler']}",
    ]
    origin = [
        f"recipe {about['recipe']}",
        f"model {about['model_digest'][:12]}" + (", trained on phantoms" if about["trained_on"] == "phantoms" else ""),
        f"seed {about['run_seed']}",
        f"diffva-ray {about['diffva_ray']} ({about['code_revision']})",
    ]
    return ["; ".join(legend) + ".", " · ".join(settings), " · ".join(origin)]


def _difference(config: dict[str, Any]) -> str:
    first = "film" if config["difference"] == "raw" else "film through the autoencoder"
    return f"{first} − twin" + (f", smoothed by {config['smoothing']:.1%} of the width" if config["smoothing"] else "")


def short_path(path: str) -> str:
    """The end of a path, which is what tells films apart; folders above it are nobody's business on a sheet."""
    end = "/".join(path.split("/")[-3:])
    return end if len(end) <= 80 else "…" + end[-79:]


def describe(explanation: Explanation) -> str:
    """The numbers on a terminal, a paragraph per prompt."""
    about = explanation.about
    lines = [
        f"{about['film']}: {about['width']} x {about['height']} px; model {about['model_digest'][:12]}, "
        f"recipe {about['recipe']}, seed {about['run_seed']}"
    ]
    if about["trained_on"] == "phantoms":
        lines.append("the model was trained on phantoms and has not learned real films")
    lines += [f"“{answer.prompt}”: {' · '.join(said(answer))}" for answer in explanation.answers]
    return "\n".join([*lines, "Not for clinical use."])
