"""A strip of images between two prompts or between two images, with what the judge makes of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from diffva_ray.config.recipe import Recipe
from diffva_ray.counterfactual.attribution import attribution
from diffva_ray.counterfactual.interpolation import between_images, between_prompts
from diffva_ray.data.dataset import UnusableData
from diffva_ray.data.images import to_square
from diffva_ray.evaluate.drawing import INK, MUTED, Scale, colour_bar, colour_limit, diverging, png
from diffva_ray.explain.image import mask_beside, open_image, open_model, origin
from diffva_ray.explain.sheet import LEAST_LIMIT, short_path, write_png
from diffva_ray.generate.plan import check_settings
from diffva_ray.schema import Image, record_seed

PANEL, GAP, LEFT, TOP, FOOT, BAR = 1.35, 0.05, 0.95, 0.42, 0.56, 0.32  # inches


@dataclass(frozen=True)
class Strip:
    """Images [n, size, size] at ``weights`` between two ends; ``maps`` of the same shape where one image is shown under
    two prompts; ``healthy`` [n] where the model has a judge. ``about``: images, model, settings, seed, code."""

    weights: list[float]
    images: Image
    maps: Image | None
    healthy: list[float] | None
    about: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Everything but the pixels, ready for JSON."""
        return {**self.about, "weights": self.weights, "healthy": self.healthy}


def interpolate(
    image: str,
    model: str,
    recipe: Recipe,
    prompts: Sequence[str] = (),
    other: str | None = None,
    frames: int = 7,
    device: str | None = None,
) -> Strip:
    """``frames`` images, equally spaced: of the image at ``image`` from the first of two prompts to the second, or,
    where ``other`` names an image, from one image to the other (under one prompt, or unedited).

    Raises UnusableData (images, the number of prompts, a prompt that is too long), UnusableModel and PlanError.
    """
    config = recipe.generate
    check_settings(config, {})
    if other is None and len(prompts) != 2:
        raise UnusableData(
            "give --prompt twice for a strip between two prompts, or --to IMAGE for one between two images"
        )
    if other is not None and len(prompts) > 1:
        raise UnusableData("--to IMAGE goes with one --prompt at most")
    data, pixels = open_image(image, config.min_side, recipe.data.bits)
    ends = [pixels] if other is None else [pixels, open_image(other, config.min_side, recipe.data.bits)[1]]
    engine, judge = open_model(model, recipe, prompts, device)
    weights = [float(weight) for weight in np.linspace(0, 1, frames)]
    seed = record_seed(recipe.seed, image.rpartition("/")[2], 0)
    squares = [to_square(end, engine.size) for end in ends]
    maps = None
    if other is None:
        first, second = prompts
        lungs = mask_beside(image, "masks", engine.size)
        counterfactuals = between_prompts(engine, squares[0], first, second, weights, seed, lungs)
        found = counterfactuals.counterfactuals
        maps = np.stack(
            [
                attribution(squares[0], rebuilt, counterfactual, config)
                for rebuilt, counterfactual in zip(counterfactuals.reconstructions, found)
            ]
        )
    else:
        found = between_images(engine, squares[0], squares[1], weights, prompts[0] if prompts else None)
    if not np.isfinite(found).all():
        raise UnusableData(f"{image}: the networks gave NaN or infinity for this image")
    about = {**origin(image, data, model, engine, recipe, seed), "to": other, "prompts": list(prompts)}
    healthy = None if judge is None else [float(p) for p in judge.healthy_probability(found)]
    return Strip(weights, found, maps, healthy, about)


def write_strip(strip: Strip, path: str) -> None:
    """Draw the strip and write it to ``path`` (a .png, local or ``s3://``). Raises UnusableData for another ending."""
    write_png(draw(strip), path)


def draw(strip: Strip) -> bytes:
    """PNG: the images from left to right with their weights and the judge's probability, and below them their maps."""
    rows = 1 if strip.maps is None else 2
    width = LEFT + len(strip.images) * (PANEL + GAP) + 0.12
    foot = FOOT + (BAR if rows == 2 else 0)
    height = TOP + 0.22 + rows * (PANEL + GAP) + foot
    figure = Figure(figsize=(width, height), facecolor="white")
    _text(figure, 0.12 / width, 1 - 0.2 / height, _title(strip), 9.5, INK, weight="bold")
    scale = Scale(0, "", colour_limit(strip.maps.ravel(), LEAST_LIMIT)) if strip.maps is not None else None
    for row in range(rows):
        bottom = height - TOP - 0.22 - row * (PANEL + GAP) - PANEL
        name = ("counterfactual" if rows == 2 else "image", "signed map")[row]
        _text(figure, 0.12 / width, (bottom + PANEL / 2) / height, name, 8.5, INK)
        for column, weight in enumerate(strip.weights):
            left = (LEFT + column * (PANEL + GAP)) / width
            axes = figure.add_axes((left, bottom / height, PANEL / width, PANEL / height))
            axes.set_axis_off()
            if row and strip.maps is not None and scale is not None:
                axes.imshow(diverging(strip.maps[column], scale.limit), interpolation="bicubic")
                continue
            axes.imshow(strip.images[column], cmap="gray", vmin=0, vmax=1, interpolation="bicubic")
            judged = f"\nhealthy {strip.healthy[column]:.2f}" if strip.healthy is not None else ""
            axes.set_title(f"{weight:.2f}{judged}", fontsize=8, color=MUTED, pad=3, linespacing=1.3)
    if scale is not None:
        colour_bar(figure, scale, (width - 0.12 - 2 * PANEL) / width, (foot - 0.17) / height, 2 * PANEL / width, height)
    _text(figure, 0.12 / width, 0.36 / height, _settings(strip), 7, MUTED)
    _text(figure, 0.12 / width, 0.14 / height, "Not for clinical use.", 7.5, INK, weight="bold")
    return png(figure)


def _text(figure: Figure, x: float, y: float, text: str, size: float, colour: str, **style: Any) -> None:
    figure.text(x, y, text, fontsize=size, color=colour, va="center", parse_math=False, **style)


def _title(strip: Strip) -> str:
    about = strip.about
    if about["to"] is None:
        return f"{short_path(about['image'])}: from “{about['prompts'][0]}” to “{about['prompts'][1]}”"
    told = f", under “{about['prompts'][0]}”" if about["prompts"] else ""
    return f"from {short_path(about['image'])} to {short_path(about['to'])}{told}"


def _settings(strip: Strip) -> str:
    about = strip.about
    config = about["settings"]
    path = "DDIM inversion, spherical" if about["to"] else f"{config['method']}, scheduler {config['scheduler']}"
    return (
        f"{path} · strength {config['strength']:g} · guidance {config['guidance_scale']:g} · "
        f"{config['num_inference_steps']} steps\nrecipe {about['recipe']} · model {about['model_digest'][:12]} · "
        f"seed {about['run_seed']} · diffva-ray {about['diffva_ray']} ({about['code_revision']})"
    )
