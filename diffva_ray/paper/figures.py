"""Figures 2 to 10: a run's own grid for one prompt, a sheet of variants where prompts or ablations share images.

One threshold and one colour for a whole figure; the caption says them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from diffva_ray.data.dataset import LabelledImage
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.images import BadImage
from diffva_ray.evaluate.direction import direction
from diffva_ray.evaluate.drawing import INK, MUTED, overlay, png, short
from diffva_ray.evaluate.figures import GAP, LEFT, LINE, PANEL, QUANTILE, TOP, figure_grid
from diffva_ray.evaluate.records import RecordImages, Truth, finished, read_images, read_records, read_truth
from diffva_ray.evaluate.tables import known
from diffva_ray.generate.run import Run
from diffva_ray.metrics.counterfactual import side_share
from diffva_ray.paper.experiments import EXPERIMENTS, SETTINGS, guided
from diffva_ray.paper.state import Made, settings_of
from diffva_ray.schema import Row, digest

LEAST = 0.02  # red is at least that much of the grey range: an image's own noise is no finding


@dataclass(frozen=True)
class Drawn:
    """A figure of the paper: its PNG at ``path`` below the output folder."""

    number: int
    title: str
    caption: str
    path: str


@dataclass(frozen=True)
class Variant:
    """One pair of columns: counterfactual and overlay of every image under one run and prompt."""

    title: str
    run: Run
    prompt: str | None = None  # of a run with several


@dataclass(frozen=True)
class _Panel:
    row: Row
    images: RecordImages
    truth: Truth
    sign: int


def draw_figures(made: Made) -> list[Drawn]:
    """Every figure that can be made; the others are noted in ``made.missing``."""
    drawn = []
    for number, title, draw in FIGURES:
        try:
            picture, caption = draw(made)
        except (KeyError, ValueError) as error:
            reason = f"run {error} was not made" if isinstance(error, KeyError) else str(error)
            made.missing.append((f"figure {number}, {title}", reason))
            continue
        path = f"figures/figure{number:02d}.png"
        made.store.put(path, picture)
        drawn.append(Drawn(number, title, caption, path))
    return drawn


def _grid(name: str) -> Callable[[Made], tuple[bytes, str]]:
    def draw(made: Made) -> tuple[bytes, str]:
        run = made.runs[name]
        return figure_grid(run), f"{SETTINGS[name].capitalize()}. {settings_of(run)}. {_tested(made)}"

    return draw


def _variants(name: str, note: str) -> Callable[[Made], tuple[bytes, str]]:
    def draw(made: Made) -> tuple[bytes, str]:
        run = made.runs[name]
        prompts = next(experiment.prompts for experiment in EXPERIMENTS if experiment.name == name)
        variants = [Variant(f"“{prompt}”", run, prompt) for prompt in prompts]
        picture, said = sheet(variants, images_of(run))
        return picture, f"{note} {said} {settings_of(run, prompt=False)}. {_zero_shot(made, prompts)}"

    return draw


def _ablation(name: str, title: str) -> Callable[[Made], tuple[bytes, str]]:
    def draw(made: Made) -> tuple[bytes, str]:
        full, run = made.runs["generate-0.55"], made.runs[name]
        variants = [Variant("full method", full), Variant(title, run)]
        if "prompt-only" in made.runs:
            variants.append(Variant("control: empty prompt", made.runs["prompt-only"]))
        healthy = made.base.data.healthy_class
        picture, said = sheet(variants, one_of_each(open_dataset(made.radiography, made.base.data).images, healthy))
        off = "" if guided(run.recipe.generate, run.keys["prompt"]) else " Guidance is off in the ablation."
        return picture, f"{said} Ablation: {settings_of(run)}.{off}"

    return draw


def _sides(made: Made) -> tuple[bytes, str]:
    run = made.runs["sides"]
    picture, caption = _variants("sides", "Left is the patient's left, which is the right half of the image.")(made)
    shares = []
    for prompt, values in side_shares(run).items():
        shares.append(f"“{prompt}”: {np.mean(values):.0%} of the change on the patient's left (n = {len(values)})")
    return picture, f"{caption} {'; '.join(shares)}."


def side_shares(run: Run) -> dict[str, list[float]]:
    """Share of each map's energy on the patient's left, by prompt."""
    found = dict[str, list[float]]()
    for row in finished(read_records(run)).to_dict("records"):
        share = side_share(read_images(run, row).signed_map)
        found.setdefault(row["prompt"], []).append(share)
    return dict(sorted(found.items()))


def _tested(made: Made) -> str:
    kind = made.card.get("data_kind")
    return "The model was trained on phantoms." if kind == "phantoms" else ""


def _zero_shot(made: Made, prompts: Sequence[str]) -> str:
    known = {prompt.casefold() for prompt in made.base.data.prompts.values()}
    unknown = [prompt for prompt in prompts if prompt.casefold() not in known]
    return (
        f"Never a training prompt of this model: {', '.join(f'“{prompt}”' for prompt in unknown)}." if unknown else ""
    )


def images_of(run: Run, most: int = 3) -> list[str]:
    """Paths of the first finished images of a run, by the digest of their paths."""
    paths = finished(read_records(run))["image_path"].unique()
    return sorted(paths, key=digest)[:most]


def one_of_each(images: Sequence[LabelledImage], healthy: str) -> list[str]:
    """One image of each abnormal class, by the digest of its path."""
    found: dict[str, str] = {}
    for image in sorted(images, key=lambda image: digest(image.path)):
        if image.label != healthy:
            found.setdefault(image.label, image.path)
    return [found[label] for label in sorted(found)]


def _read(variant: Variant, paths: Sequence[str]) -> list[_Panel | None]:
    records = finished(read_records(variant.run))
    if variant.prompt is not None:
        records = records[records["prompt"] == variant.prompt]
    rows = {row["image_path"]: row for row in records.to_dict("records")}
    panels: list[_Panel | None] = []
    for path in paths:
        row = rows.get(path)
        try:
            panels.append(
                None
                if row is None
                else _Panel(row, read_images(variant.run, row), read_truth(variant.run, row, {}),
                            direction(variant.run, row))
            )  # fmt: skip
        except (OSError, BadImage):
            panels.append(None)
    return panels


def sheet(variants: Sequence[Variant], paths: Sequence[str]) -> tuple[bytes, str]:
    """PNG with a row for each image: the image, then counterfactual and red overlay under each variant; and what red
    means.

    Raises ValueError when no image was finished under any variant.
    """
    columns = [_read(variant, paths) for variant in variants]
    shown = [panel for column in columns for panel in column if panel]
    if not shown:
        raise ValueError("no finished image to show")
    values = np.concatenate([(panel.sign * panel.images.signed_map).ravel() for panel in shown])
    threshold = max(float(np.quantile(values, QUANTILE)), LEAST)
    kept = [n for n in range(len(paths)) if any(column[n] for column in columns)]
    width = LEFT + PANEL + GAP + len(variants) * (2 * PANEL + 3 * GAP) + 0.1
    signs = {panel.sign for panel in shown}
    red = " or ".join("M" if sign > 0 else "−M (inducing)" for sign in sorted(signs, reverse=True))
    said = (
        f"Red: {red} > {threshold:.3g} of the grey range, the {QUANTILE:.0%} quantile of the maps shown (at least "
        f"{LEAST:g}), the same for every panel, inside the lungs where their mask is known."
    )
    legend = "h: the judge's probability of healthy, image → generated; a, b, c: the columns. " + said
    foot = textwrap.wrap(legend, int(width * 21))
    head = 1.5 * TOP
    bottom = 0.16 + LINE * len(foot)
    height = head + len(kept) * (PANEL + GAP) + bottom
    figure = Figure(figsize=(width, height), facecolor="white")
    for line, n in enumerate(kept):
        low = height - head - line * (PANEL + GAP) - PANEL
        first = next(panel for column in columns if (panel := column[n]))
        _side(figure, [column[n] for column in columns], low + PANEL, width, height)
        _picture(figure, first.images.image, LEFT, low, width, height, "image" if line == 0 else "")
        for at, column in enumerate(columns):
            left = LEFT + PANEL + GAP + at * (2 * PANEL + 3 * GAP) + 2 * GAP
            if line == 0:
                title = f"{'abcdef'[at]}: {short(variants[at].title, 34)}"
                figure.text((left + PANEL + GAP / 2) / width, 1 - 0.14 / height, title, fontsize=8, color=INK,
                            weight="bold", ha="center", va="center", parse_math=False)  # fmt: skip
            panel = column[n]
            if panel is None:
                continue
            signed = panel.sign * panel.images.signed_map
            red_image = overlay(panel.images.image, signed, threshold, panel.truth.lungs)
            _picture(figure, panel.images.counterfactual, left, low, width, height, "generated" if line == 0 else "")
            _picture(figure, red_image, left + PANEL + GAP, low, width, height, "red overlay" if line == 0 else "")
    figure.text(0.1 / width, 0.08 / height, "\n".join(foot), fontsize=6.5, color=MUTED, va="bottom", linespacing=1.45,
                parse_math=False)  # fmt: skip
    return png(figure), said


def _picture(
    figure: Figure, image: np.ndarray, left: float, low: float, width: float, height: float, title: str
) -> None:
    axes = figure.add_axes((left / width, low / height, PANEL / width, PANEL / height))
    axes.set_axis_off()
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="bicubic")
    if title:
        axes.set_title(title, fontsize=7.5, color=MUTED, pad=3)


def _side(figure: Figure, panels: Sequence[_Panel | None], top: float, width: float, height: float) -> None:
    """Class and likeness of a row, at its left."""
    first = next(panel for panel in panels if panel)
    figure.text(0.1 / width, (top - 0.12) / height, short(first.row["label"], 17), fontsize=8, color=INK, weight="bold",
                va="center", parse_math=False)  # fmt: skip
    lines = []
    for n, panel in enumerate(panels):
        if panel is None:
            continue
        row = panel.row
        judged = known(row["judge_image"])
        healthy = f", h {row['judge_image']:.2f}→{row['judge_counterfactual']:.2f}" if judged else ""
        lines.append(f"{'abcdef'[n]}: SSIM {row['ssim']:.2f}{healthy}")
    figure.text(0.1 / width, (top - 0.28) / height, "\n".join(lines), fontsize=6.3, color=MUTED, va="top",
                linespacing=1.5)  # fmt: skip


FIGURES: tuple[tuple[int, str, Callable[[Made], tuple[bytes, str]]], ...] = (
    (2, "Healthy counterfactuals and red overlays, 0.85 / 7.5 / 75", _grid("generate-0.85")),
    (3, "Healthy counterfactuals and red overlays, 0.55 / 4", _grid("generate-0.55")),
    (4, "Carcinoma induced, by severity", _variants("carcinoma", "Healthy images made ill.")),
    (5, "Cardiomegaly induced, by severity", _variants("cardiomegaly-severity", "Healthy images made ill.")),
    (6, "Inductions of the trained classes", _variants("inductions", "Healthy images made ill.")),
    (7, "Ablation: no text", _ablation("no-text", "no text encoder")),
    (8, "Ablation: no image prior", _ablation("no-image-prior", "no image prior")),
    (9, "Ablation: neither", _ablation("neither", "neither")),
    (10, "Lung opacity on one side", _sides),
)
