"""python docs/draw_concepts.py --model runs/demo/model: the pictures of docs/concepts.md, on a phantom that the demo's
model has not seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from diffva_ray.counterfactual.attribution import attribution
from diffva_ray.counterfactual.engine import Counterfactuals, Twins
from diffva_ray.counterfactual.latent_diffusion import noise
from diffva_ray.data.phantoms import Phantom, phantom
from diffva_ray.evaluate.drawing import DIVERGING, INK, MUTED, outline, png
from diffva_ray.metrics.localization import positive, score
from diffva_ray.model.schedulers import schedule

Image = NDArray[np.float32]
SEED, PATIENT, LABEL = 90210, 4, "COVID"  # films of no split
STRENGTHS = (0.2, 0.4, 0.6, 0.8)
LIMIT = 0.2  # of the maps' colours


def noised(heal: Counterfactuals, film: Image, strength: float) -> Image:
    """What is left of a film at the noise level from which it is put together again, decoded."""
    with torch.inference_mode():
        mean, _ = heal.model.encode(torch.from_numpy(film)[None])
        latents = mean.float() * heal.model.scale
        scheduler, timesteps = schedule("ddim", heal.bundle.scheduler, 50, strength)
        fresh = noise(latents.shape, [torch.Generator().manual_seed(0)])
        return heal.model.decode(scheduler.add_noise(latents, fresh, timesteps[:1]))[0].numpy()


def healed(heal: Counterfactuals, film: Phantom, **settings: object) -> Twins:
    asked = replace(heal.settings(), **settings)  # type: ignore[arg-type]
    return heal([film.film], [asked], seeds=[0], lungs=[film.lungs])


def panel(axes: Axes, image: Image, title: str, lesion: NDArray[np.bool_] | None = None, signed: bool = False) -> None:
    if signed:
        axes.imshow(image, cmap=DIVERGING, vmin=-LIMIT, vmax=LIMIT)
    else:
        axes.imshow(image, cmap="gray", vmin=0, vmax=1)
    outline(axes, lesion)
    axes.set_title(title, fontsize=8, color=INK, pad=3)
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)


def ladder(heal: Counterfactuals, film: Phantom) -> Figure:
    """Rows: the film taken apart, the twin put together again (sdedit), its map, and the map of DDIM inversion."""
    figure = Figure(figsize=(7.6, 6.4), facecolor="white", layout="constrained")
    grid = figure.subplots(4, len(STRENGTHS) + 1)
    panel(grid[0][0], film.film, "film, lesion outlined", film.lesion)
    panel(grid[1][0], film.twin, "true twin")
    panel(grid[2][0], film.film - film.twin, "true difference", signed=True)
    grid[3][0].axis("off")
    for column, strength in enumerate(STRENGTHS, 1):
        panel(grid[0][column], noised(heal, film.film, strength), f"strength {strength:g}: taken apart")
        for method in ("sdedit", "ddim-inversion"):
            twins = healed(heal, film, method=method, strength=strength)
            twin, rebuilt = twins.counterfactuals[0], twins.reconstructions[0]
            signed = attribution(film.film, rebuilt, twin, heal.config)
            found = score(positive(signed), film.lesion, film.lungs | film.lesion)
            told = f"AUROC {found.auroc:.2f}" if found else ""
            if method == "sdedit":
                panel(grid[1][column], twin, "twin (sdedit)")
            panel(grid[2 if method == "sdedit" else 3][column], signed, f"map, {method}\n{told}", film.lesion, True)
    return figure


def scoring(heal: Counterfactuals, film: Phantom) -> Figure:
    """How a map is scored: raw and compensated map, its positive part in the lungs, and what a threshold marks."""
    twins = healed(heal, film)
    twin, rebuilt = twins.counterfactuals[0], twins.reconstructions[0]
    raw, signed = film.film - twin, attribution(film.film, rebuilt, twin, heal.config)
    region = film.lungs | film.lesion
    found = score(positive(signed), film.lesion, region)
    threshold = 0.03
    marked = (signed >= threshold) & region
    colours = np.ones((*film.film.shape, 3), np.float32) * 0.93
    colours[region] = 0.78
    colours[marked & film.lesion] = (0.0, 0.45, 0.35)
    colours[marked & ~film.lesion] = (0.80, 0.35, 0.0)
    colours[~marked & film.lesion & region] = (0.0, 0.45, 0.70)
    figure = Figure(figsize=(8.6, 2.1), facecolor="white", layout="constrained")
    axes = figure.subplots(1, 6)
    panel(axes[0], film.film, "film", film.lesion)
    panel(axes[1], twin, "twin")
    panel(axes[2], raw, "film − twin", signed=True)
    panel(axes[3], signed, "compensated, smoothed", film.lesion, signed=True)
    panel(axes[4], np.where(region, positive(signed), np.nan), "positive part, in lungs", film.lesion, signed=True)
    axes[5].imshow(colours)
    dice = 2 * (marked & film.lesion).sum() / (marked.sum() + (film.lesion & region).sum())
    panel_title = f"above τ: Dice {dice:.2f}"
    axes[5].set_title(panel_title, fontsize=8, color=INK, pad=3)
    axes[5].axis("off")
    auroc = f"AUROC {found.auroc:.2f}, " if found else ""
    figure.supxlabel(
        f"{auroc}green: found; orange: marked and healthy; blue: missed. τ = {threshold:g}", fontsize=7.5, color=MUTED
    )
    return figure


@click.command()
@click.option("--model", default="runs/demo/model", show_default=True)
@click.option("--out", default="docs/images", show_default=True, type=click.Path(path_type=Path))
def main(model: str, out: Path) -> None:
    heal = Counterfactuals.from_pretrained(model, "cpu")
    film = phantom(LABEL, PATIENT, SEED, heal.size)
    (out / "strength.png").write_bytes(png(ladder(heal, film)))
    (out / "scoring.png").write_bytes(png(scoring(heal, film)))


if __name__ == "__main__":
    main()
