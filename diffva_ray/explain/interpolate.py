"""Strips of images between two prompts or between two images, with the judge's probability of each."""

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
from diffva_ray.explain.sheet import MIN_LIMIT, short_path, write_png
from diffva_ray.generate.plan import check_settings
from diffva_ray.schema import Image, record_seed

PANEL, GAP, LEFT, TOP, FOOT, BAR = 1.35, 0.05, 0.95, 0.42, 0.56, 0.32  # inches


@dataclass(frozen=True)
class Strip:
    """Images between two ends."""

    weights: list[float]  # of the second end, from 0 to 1
    images: Image  # [n, size, size] in [0, 1]
    maps: Image | None  # attribution maps [n, size, size]; None between two images
    healthy: list[float] | None  # probability of healthy [n]; None if the model has no judge
    about: dict[str, Any]  # images, model, settings, seed, code

    def as_dict(self) -> dict[str, Any]:
        """All but the pixels, ready for JSON."""
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
    """Interpolate between two prompts on one image, or between two images.

    Args:
        image: Path of the (first) image, local or ``s3://``.
        model: Model folder, local or ``s3://``.
        recipe: Recipe of the generation.
        prompts: First and second prompt; between two images, one prompt or none (unedited).
        other: Path of the second image; None to interpolate between prompts.
        frames: Number of images, equally spaced.
        device: ``cpu`` or ``cuda``; by default the GPU where there is one.

    Returns:
        The images, with attribution maps between prompts.

    Raises:
        UnusableData: If an image is unusable, or the number or length of the prompts.
        UnusableModel: If the model cannot be loaded.
        PlanError: If the settings cannot generate any image.
    """
    config = recipe.generate
    check_settings(config, {})
    if other is None and len(prompts) != 2:
        raise UnusableData(
            "give --prompt twice for a strip between two prompts, or --to IMAGE for one between two images"
        )
    if other is not None and len(prompts) > 1:
        raise UnusableData("--to IMAGE goes with one --prompt at most")

    # Read the images, load the model.
    data, pixels = open_image(image, config.min_side, recipe.data.bits)
    ends = [pixels] if other is None else [pixels, open_image(other, config.min_side, recipe.data.bits)[1]]
    engine, judge = open_model(model, recipe, prompts, device)
    weights = [float(weight) for weight in np.linspace(0, 1, frames)]
    seed = record_seed(recipe.seed, image.rpartition("/")[2], 0)
    squares = [to_square(end, engine.size) for end in ends]

    # Interpolate, with attribution maps where one image is edited.
    maps = None
    if other is None:
        lungs = mask_beside(image, "masks", engine.size)
        batch = between_prompts(engine, squares[0], prompts[0], prompts[1], weights, seed, lungs)
        images = batch.counterfactuals
        pairs = zip(batch.reconstructions, images)
        maps = np.stack([attribution(squares[0], *pair, config) for pair in pairs])
    else:
        images = between_images(engine, squares[0], squares[1], weights, prompts[0] if prompts else None)
    if not np.isfinite(images).all():
        raise UnusableData(f"{image}: the networks gave NaN or infinity for this image")
    about = {**origin(image, data, model, engine, recipe, seed), "to": other, "prompts": list(prompts)}
    healthy = None if judge is None else [float(p) for p in judge.healthy_probability(images)]
    return Strip(weights, images, maps, healthy, about)


def write_strip(strip: Strip, path: str) -> None:
    """Draw the strip and write it to ``path`` (a .png, local or ``s3://``). Raises UnusableData for another ending."""
    write_png(draw(strip), path)


def draw(strip: Strip) -> bytes:
    """Draw a PNG: the images from left to right with weights and judge's probabilities, and their maps below."""
    # Size of the figure, in inches.
    rows = 1 if strip.maps is None else 2
    width = LEFT + len(strip.images) * (PANEL + GAP) + 0.12
    foot = FOOT + (BAR if rows == 2 else 0)
    height = TOP + 0.22 + rows * (PANEL + GAP) + foot
    figure = Figure(figsize=(width, height), facecolor="white")
    _text(figure, 0.12 / width, 1 - 0.2 / height, _title(strip), 9.5, INK, weight="bold")
    scale = Scale(0, "", colour_limit(strip.maps.ravel(), MIN_LIMIT)) if strip.maps is not None else None

    # A row of images, and one of maps.
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
            probability = f"\nhealthy {strip.healthy[column]:.2f}" if strip.healthy is not None else ""
            axes.set_title(f"{weight:.2f}{probability}", fontsize=8, color=MUTED, pad=3, linespacing=1.3)

    # Colour bar and footer.
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
    under = f", under “{about['prompts'][0]}”" if about["prompts"] else ""
    return f"from {short_path(about['image'])} to {short_path(about['to'])}{under}"


def _settings(strip: Strip) -> str:
    about = strip.about
    config = about["settings"]
    path = "DDIM inversion, spherical" if about["to"] else f"{config['method']}, scheduler {config['scheduler']}"
    return (
        f"{path} · strength {config['strength']:g} · guidance {config['guidance_scale']:g} · "
        f"{config['num_inference_steps']} steps\nrecipe {about['recipe']} · model {about['model_digest'][:12]} · "
        f"seed {about['run_seed']} · diffva-ray {about['diffva_ray']} ({about['code_revision']})"
    )
