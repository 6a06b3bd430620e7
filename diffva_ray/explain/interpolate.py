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
from diffva_ray.evaluate.drawing import Panel, PanelRow, Scale, colour_limit, diverging, panel_sheet
from diffva_ray.explain.image import mask_beside, open_image, open_model, origin
from diffva_ray.explain.sheet import origin_texts, settings_texts, short_path, write_figure
from diffva_ray.generate.plan import check_settings
from diffva_ray.schema import Image, record_seed


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
    """Interpolate in ``frames`` equal steps between two prompts on one image, or between two images (``other``), edited
    by one prompt or not at all. Raises as ``explain``."""
    config = recipe.generate
    check_settings(config, {})
    if other is None and len(prompts) != 2:
        raise UnusableData(
            "give --prompt twice for a strip between two prompts, or --to IMAGE for one between two images"
        )
    if other is not None and len(prompts) > 1:
        raise UnusableData("--to IMAGE goes with one --prompt at most")

    # Read the images, load the model.
    data, pixels, _ = open_image(image, config.min_side, recipe.data.bits)
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
    """Draw the strip and write it to ``path``; raises as ``write_figure``."""
    write_figure(draw(strip), path)


def draw(strip: Strip) -> Figure:
    """Draw the images from left to right with weights and judge's probabilities, and their maps below."""
    titles = [f"{weight:.2f}" for weight in strip.weights]
    if strip.healthy is not None:
        titles = [f"{title}\nhealthy {probability:.2f}" for title, probability in zip(titles, strip.healthy)]
    name = "image" if strip.maps is None else "counterfactual"
    rows, scale = [PanelRow(name, [], [Panel(image) for image in strip.images])], None
    if strip.maps is not None:
        scale = Scale(0, "", colour_limit(strip.maps.ravel()))
        maps = [Panel(diverging(signed_map, scale.limit)) for signed_map in strip.maps]
        rows.append(PanelRow("signed map", [], maps))
    bar = len(titles) - 1
    return panel_sheet(rows, titles, _settings(strip), scale, bar, side=1.35, heading=_title(strip))


def _title(strip: Strip) -> str:
    about = strip.about
    if about["to"] is None:
        return f"{short_path(about['image'])}: from “{about['prompts'][0]}” to “{about['prompts'][1]}”"
    under = f", under “{about['prompts'][0]}”" if about["prompts"] else ""
    return f"from {short_path(about['image'])} to {short_path(about['to'])}{under}"


def _settings(strip: Strip) -> list[str]:
    about = strip.about
    path = "DDIM inversion, spherical" if about["to"] else about["settings"]["method"]
    return [" · ".join([path, *settings_texts(about)]), " · ".join(origin_texts(about))]
