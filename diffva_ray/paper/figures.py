"""Figures 2 to 10: the grid of a run, or a sheet of variants for several prompts or ablations of the same images.

Threshold and colour are the same for all panels of a figure and are given in its caption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from diffva_ray.data.images import to_square
from diffva_ray.evaluate.drawing import Panel, PanelRow, panel_sheet, png, short
from diffva_ray.evaluate.figures import QUANTILE, ShownRecord, figure_grid
from diffva_ray.evaluate.records import as_records, finished, read_images, read_records
from diffva_ray.evaluate.tables import known
from diffva_ray.generate.run import Run
from diffva_ray.metrics.counterfactual import side_share
from diffva_ray.paper.experiments import EXPERIMENTS, SETTINGS, guided
from diffva_ray.paper.state import PaperState, settings_of
from diffva_ray.schema import Image, digest

MIN_THRESHOLD = 0.02  # of the grey range; smaller differences are noise of the image


@dataclass(frozen=True)
class PaperFigure:
    """A figure of the paper."""

    number: int
    title: str
    caption: str
    path: str  # of its PNG, below the output folder


@dataclass(frozen=True)
class Variant:
    """A pair of columns of a sheet: counterfactual and overlay of every image in one run and with one prompt."""

    title: str
    run: Run
    prompt: str | None = None  # of a run with several


def draw_figures(state: PaperState) -> list[PaperFigure]:
    """Write all figures that can be made; the others are listed in ``state.missing``."""
    figures = []
    for number, title, draw, run, text in FIGURES:
        try:
            png_data, caption = draw(state, run, text)
        except (KeyError, ValueError) as error:
            reason = f"run {error} was not made" if isinstance(error, KeyError) else str(error)
            state.missing.append((f"figure {number}, {title}", reason))
            continue
        path = f"figures/figure{number:02d}.png"
        state.store.put(path, png_data)
        figures.append(PaperFigure(number, title, caption, path))
    return figures


def _grid(state: PaperState, name: str, text: str) -> tuple[bytes, str]:
    run = state.runs[name]
    return png(figure_grid(run)), f"{SETTINGS[name].capitalize()}. {settings_of(run)}. {_training_data(state)}"


def _variants(state: PaperState, name: str, text: str) -> tuple[bytes, str]:
    """A column pair for each prompt; ``text`` begins the caption."""
    run = state.runs[name]
    prompts = next(experiment.prompts for experiment in EXPERIMENTS if experiment.name == name)
    png_data, legend = sheet([Variant(f"“{prompt}”", run, prompt) for prompt in prompts], images_of(run))
    return png_data, f"{text} {legend} {settings_of(run, prompt=False)}. {_zero_shot(state, prompts)}"


def _ablation(state: PaperState, name: str, text: str) -> tuple[bytes, str]:
    """An ablation (called ``text``) of healthy images, and its control."""
    run = state.runs[name]
    variants = [Variant(text, run)]
    if CONTROLS[name][0] in state.runs:
        variants.append(Variant(f"control: {CONTROLS[name][1]}", state.runs[CONTROLS[name][0]]))
    png_data, legend = sheet(variants, images_of(run))
    off = "" if guided(run.recipe.generate, run.keys["prompt"]) else " Guidance is off in the ablation."
    return png_data, f"{legend} Ablation: {settings_of(run)}.{off}"


def _opacities(state: PaperState, name: str, text: str) -> tuple[bytes, str]:
    """Three images of lung opacity."""
    run = state.runs[name]
    png_data, legend = sheet([Variant("healthy", run)], images_of(run, label=OPACITY))
    return png_data, f"{legend} {settings_of(run)}. {_training_data(state)}"


def _carcinoma(state: PaperState, name: str, text: str) -> tuple[bytes, str]:
    """The bare prompt on healthy images, beside a real case."""
    run = state.runs[name]
    (prompt,) = next(experiment.prompts for experiment in EXPERIMENTS if experiment.name == name)
    real = None if state.carcinoma is None else to_square(state.carcinoma, state.base.model.resolution)
    title = "a phantom mass" if state.options.radiography is None and not state.options.carcinoma else "a real case"
    png_data, legend = sheet([Variant(f"“{prompt}”", run)], images_of(run), None if real is None else (title, real))
    return png_data, f"{text} {legend} {settings_of(run)}. {_zero_shot(state, [prompt])}"


def _two_settings(state: PaperState, name: str, text: str) -> tuple[bytes, str]:
    """One prompt on the same healthy images under two settings of strength and guidance."""
    runs = [state.runs[name], state.runs["cardiomegaly-0.55"]]
    titles = [f"strength {run.keys['strength']:g}, guidance {run.keys['guidance_scale']:g}" for run in runs]
    variants = [Variant(title, run) for title, run in zip(titles, runs)]
    png_data, legend = sheet(variants, images_of(runs[0]))
    return png_data, f"{text} {legend} {settings_of(runs[0])}. {_zero_shot(state, [runs[0].keys['prompt']])}"


def _sides(state: PaperState, name: str, text: str) -> tuple[bytes, str]:
    png_data, caption = _variants(state, name, text)
    shares = [
        f"“{prompt}”: {np.mean(values):.0%} of the change on the patient's left (n = {len(values)})"
        for prompt, values in side_shares(state.runs[name]).items()
    ]
    return png_data, f"{caption} {'; '.join(shares)}."


def side_shares(run: Run) -> dict[str, list[float]]:
    """Share of each map's energy on the patient's left, by prompt."""
    shares = dict[str, list[float]]()
    for row in as_records(finished(read_records(run))):
        shares.setdefault(row["prompt"], []).append(side_share(read_images(run, row).signed_map))
    return dict(sorted(shares.items()))


def _training_data(state: PaperState) -> str:
    return "The model was trained on phantoms." if state.card.get("data_kind") == "phantoms" else ""


def _zero_shot(state: PaperState, prompts: Sequence[str]) -> str:
    trained = {prompt.casefold() for prompt in state.base.data.prompts.values()}
    unseen = ", ".join(f"“{prompt}”" for prompt in prompts if prompt.casefold() not in trained)
    return f"Not a training prompt of this model: {unseen}." if unseen else ""


def images_of(run: Run, limit: int = 3, label: str | None = None) -> list[str]:
    """Paths of the first finished images of a run (of class ``label``), in the order of the digest of their paths."""
    records = finished(read_records(run))
    if label is not None:
        records = records[records["label"] == label]
    return sorted(records["image_path"].unique(), key=digest)[:limit]


def _read(variant: Variant, paths: Sequence[str]) -> list[ShownRecord | None]:
    records = finished(read_records(variant.run))
    if variant.prompt is not None:
        records = records[records["prompt"] == variant.prompt]
    rows = {row["image_path"]: row for row in as_records(records)}
    return [ShownRecord.read(variant.run, rows[path], {}) if path in rows else None for path in paths]


def sheet(
    variants: Sequence[Variant], paths: Sequence[str], beside: tuple[str, Image] | None = None
) -> tuple[bytes, str]:
    """PNG with a row for each image (the image, then counterfactual and red overlay of each variant), and its legend.

    ``beside``: title and pixels of a further image, at the right of the first row. Raises ValueError if no image was
    finished in any variant.
    """
    # records and their common threshold
    columns = [_read(variant, paths) for variant in variants]
    shown = [record for column in columns for record in column if record]
    if not shown:
        raise ValueError("no finished image to show")
    values = np.concatenate([(record.sign * record.images.signed_map).ravel() for record in shown])
    threshold = max(float(np.quantile(values, QUANTILE)), MIN_THRESHOLD)
    # rows of panels
    titles, rows = ["image"], list[PanelRow]()
    for letter, variant in zip("abcdef", variants):
        titles += [f"{letter}: {short(variant.title, 34)}\ncounterfactual", "\nred overlay"]
    for in_row in zip(*columns):
        first = next(filter(None, in_row), None)
        if first is None:
            continue
        panels, lines = [Panel(first.images.image)], []
        for letter, record in zip("abcdef", in_row):
            if record is None:
                panels += [Panel(None), Panel(None)]
                continue
            row, healthy = record.row, ""
            if known(row["judge_image"]):
                healthy = f", h {row['judge_image']:.2f}→{row['judge_counterfactual']:.2f}"
            lines.append(f"{letter}: SSIM {row['ssim']:.2f}{healthy}")
            panels += [Panel(record.images.counterfactual), Panel(record.red(threshold))]
        if beside:
            panels.append(Panel(None if rows else beside[1]))
        rows.append(PanelRow(short(first.row["label"], 60), lines, panels))
    titles += [beside[0]] if beside else []
    # legend
    red = " or ".join(sorted({"M" if record.sign > 0 else "−M (inducing)" for record in shown}))
    legend = (
        f"Red: {red} > {threshold:.3g} of the grey range, the {QUANTILE:.0%} quantile of the maps shown (at least "
        f"{MIN_THRESHOLD:g}), the same for every panel, inside the lungs where their mask is known."
    )
    foot = f"h: the judge's probability of healthy, image → counterfactual; a, b, c: the columns. {legend}"
    return png(panel_sheet(rows, titles, [foot])), legend


Draw = Callable[[PaperState, str, str], tuple[bytes, str]]
OPACITY = "Lung_Opacity"
CONTROLS = {  # of an ablation: its run, and its title
    "no-image-prior": ("pure-noise", "no image at all"),
    "no-text": ("healthy-0.55", "the full method"),
    "neither": ("no-text", "no text only"),
}
INDUCED = "Findings induced in healthy images."
FIGURES: tuple[tuple[int, str, Draw, str, str], ...] = (
    (2, "Healthy counterfactual generation for three cases of lung opacity", _opacities, "generate-0.85", ""),
    (3, "Healthy counterfactual generation", _grid, "generate-0.55", ""),
    (4, "Zero-shot carcinoma induction", _carcinoma, "carcinoma", INDUCED),
    (5, "Induction of cardiomegaly in healthy images, two settings", _two_settings, "cardiomegaly-0.85", INDUCED),
    (6, "Induction of baseline diseases in healthy images", _variants, "inductions", INDUCED),
    (7, "Elimination of image priors", _ablation, "no-image-prior", "strength 0.99"),
    (8, "Elimination of the text encoder, with a healthy image as image prior", _ablation, "no-text", "no text"),
    (9, "Elimination of the text encoder and image priors", _ablation, "neither", "neither"),
    (10, "Localized lung opacity induction in healthy images", _sides, "sides",
     "Left is the patient's left, which is the right half of the image."),
)  # fmt: skip
