"""Draw the figures of docs/concepts.md on a phantom that the demo's model has not seen.

python docs/draw_concepts.py --model runs/demo/model
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from diffva_ray.counterfactual.attribution import attribution
from diffva_ray.counterfactual.engine import CounterfactualBatch, CounterfactualEngine
from diffva_ray.counterfactual.latent_diffusion import noise
from diffva_ray.data.phantoms import Phantom, phantom
from diffva_ray.evaluate.drawing import DIVERGING, INK, MUTED, outline, png
from diffva_ray.metrics.localization import positive, score
from diffva_ray.model.schedulers import schedule

Image = NDArray[np.float32]
SEED, PATIENT, LABEL = 90210, 4, "COVID"  # in none of the demo's splits
STRENGTHS = (0.2, 0.4, 0.6, 0.8)
LIMIT = 0.2  # grey level at which the colours of the maps saturate


def noised(engine: CounterfactualEngine, image: Image, strength: float) -> Image:
    """Add noise up to ``strength`` to an image's latents, and decode them."""
    with torch.inference_mode():
        mean, _ = engine.model.encode(torch.from_numpy(image)[None])
        latents = mean.float() * engine.model.scale
        scheduler, timesteps = schedule("ddim", engine.bundle.scheduler, 50, strength)
        fresh = noise(latents.shape, [torch.Generator().manual_seed(0)])
        return engine.model.decode(scheduler.add_noise(latents, fresh, timesteps[:1]))[0].numpy()


def generated(engine: CounterfactualEngine, image: Phantom, **settings: object) -> CounterfactualBatch:
    return engine([image.image], seeds=[0], settings=engine.settings.replace(**settings), lungs=[image.lungs])


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


def strength_figure(engine: CounterfactualEngine, image: Phantom) -> Figure:
    """Draw four rows: noised image, counterfactual (sdedit), its map, and the map of DDIM inversion."""
    figure = Figure(figsize=(7.6, 6.4), facecolor="white", layout="constrained")
    grid = figure.subplots(4, len(STRENGTHS) + 1)
    panel(grid[0][0], image.image, "image, lesion outlined", image.lesion)
    panel(grid[1][0], image.ground_truth, "ground truth")
    panel(grid[2][0], image.image - image.ground_truth, "true difference", signed=True)
    grid[3][0].axis("off")
    for column, strength in enumerate(STRENGTHS, 1):
        panel(grid[0][column], noised(engine, image.image, strength), f"strength {strength:g}: noised")
        for method in ("sdedit", "ddim-inversion"):
            counterfactuals = generated(engine, image, method=method, strength=strength)
            counterfactual, reconstruction = counterfactuals.counterfactuals[0], counterfactuals.reconstructions[0]
            signed = attribution(image.image, reconstruction, counterfactual, engine.config)
            scores = score(positive(signed), image.lesion, image.lungs)
            label = f"AUROC {scores.auroc:.2f}" if scores else ""
            if method == "sdedit":
                panel(grid[1][column], counterfactual, "counterfactual (sdedit)")
            panel(grid[2 if method == "sdedit" else 3][column], signed, f"map, {method}\n{label}", image.lesion, True)
    return figure


def scoring_figure(engine: CounterfactualEngine, image: Phantom) -> Figure:
    """Draw how a map is scored: raw map, compensated map, its positive part in the lungs, pixels above a threshold."""
    counterfactuals = generated(engine, image)
    counterfactual, reconstruction = counterfactuals.counterfactuals[0], counterfactuals.reconstructions[0]
    raw, signed = image.image - counterfactual, attribution(image.image, reconstruction, counterfactual, engine.config)
    region = image.lungs
    scores = score(positive(signed), image.lesion, region)
    threshold = 0.03
    marked = (signed >= threshold) & region
    colours = np.ones((*image.image.shape, 3), np.float32) * 0.93
    colours[region] = 0.78
    colours[marked & image.lesion] = (0.0, 0.45, 0.35)
    colours[marked & ~image.lesion] = (0.80, 0.35, 0.0)
    colours[~marked & image.lesion & region] = (0.0, 0.45, 0.70)
    figure = Figure(figsize=(8.6, 2.1), facecolor="white", layout="constrained")
    axes = figure.subplots(1, 6)
    panel(axes[0], image.image, "image", image.lesion)
    panel(axes[1], counterfactual, "counterfactual")
    panel(axes[2], raw, "image − counterfactual", signed=True)
    panel(axes[3], signed, "compensated, smoothed", image.lesion, signed=True)
    panel(axes[4], np.where(region, positive(signed), np.nan), "positive part, in lungs", image.lesion, signed=True)
    axes[5].imshow(colours)
    dice = 2 * (marked & image.lesion).sum() / (marked.sum() + (image.lesion & region).sum())
    panel_title = f"above τ: Dice {dice:.2f}"
    axes[5].set_title(panel_title, fontsize=8, color=INK, pad=3)
    axes[5].axis("off")
    auroc = f"AUROC {scores.auroc:.2f}, " if scores else ""
    figure.supxlabel(
        f"{auroc}green: found; orange: marked and healthy; blue: missed. τ = {threshold:g}", fontsize=7.5, color=MUTED
    )
    return figure


@click.command()
@click.option("--model", default="runs/demo/model", show_default=True)
@click.option("--out", default="docs/images", show_default=True, type=click.Path(path_type=Path))
def main(model: str, out: Path) -> None:
    engine = CounterfactualEngine.from_pretrained(model, "cpu")
    image = phantom(LABEL, PATIENT, SEED, engine.size)
    (out / "strength.png").write_bytes(png(strength_figure(engine, image)))
    (out / "scoring.png").write_bytes(png(scoring_figure(engine, image)))


if __name__ == "__main__":
    main()
