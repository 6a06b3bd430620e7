"""Figures of a run: a grid of selected images, and the distributions of the scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diffva_ray.config.sampling import SWEEPABLE
from diffva_ray.data.boxes import match, parse
from diffva_ray.data.dataset import UnusableData
from diffva_ray.data.images import BadImage, decode_map
from diffva_ray.evaluate import tables
from diffva_ray.evaluate.annotations import THRESHOLDS_FILE, lesion_shapes
from diffva_ray.evaluate.direction import direction
from diffva_ray.evaluate.drawing import (
    CLASS_COLOURS,
    FORMATS,
    INK,
    MAX_POINTS,
    MIN_THRESHOLD,
    MUTED,
    Panel,
    PanelRow,
    Scale,
    changes,
    colour_limit,
    diverging,
    overlay,
    panel_sheet,
    render,
    short,
    strip,
    style,
)
from diffva_ray.evaluate.judge_quality import judge_quality
from diffva_ray.evaluate.marks import legend_of, marks
from diffva_ray.evaluate.records import (
    Lesions,
    RecordImages,
    Truth,
    as_records,
    finished,
    read_images,
    read_json,
    read_records,
    read_truth,
    reduced_metrics,
)
from diffva_ray.generate.run import Run
from diffva_ray.schema import Image, Record

QUANTILE = 0.97  # of a run's maps: the threshold if none was fixed
SAMPLED_MAPS = 64  # maps that determine the colour scale
MAX_GRID_CLASSES, MAX_STRIPS = 4, 8  # classes in the grid and in the distributions


def map_scale(run: Run, records: pd.DataFrame) -> Scale:
    """One colour scale for the whole run.

    The threshold is that of a validation run, else this run's own, else a quantile of its maps; ``threshold_from``
    names which."""
    values = np.concatenate([signed.ravel() for signed in _sampled_maps(run, records)] or [np.zeros(1, np.float32)])
    limit = colour_limit(values)
    for row in (reduced_metrics(run) or {}).get("localization", []):
        if row["map"] == "positive" and row.get("threshold") is not None:
            return Scale(row["threshold"], f"fixed on {row['threshold_from']}", limit)
    own = read_json(run, THRESHOLDS_FILE) or {}
    if "positive" in own:
        return Scale(own["positive"], "the best mean Dice of these same images", limit)
    quantile = float(np.quantile(values, QUANTILE))
    if quantile < MIN_THRESHOLD:
        return Scale(MIN_THRESHOLD, "fixed", limit)
    return Scale(quantile, f"the {QUANTILE:.0%} quantile of this run's maps", limit)


def _sampled_maps(run: Run, records: pd.DataFrame) -> Iterator[Image]:
    """Yields maps evenly sampled from the run, with the sign in which they are shown red."""
    ok = finished(records[["status", "label", "prompt", "attribution_path"]]).sort_values("attribution_path")
    for row in as_records(ok[:: max(len(ok) // SAMPLED_MAPS, 1)][:SAMPLED_MAPS]):
        try:
            yield direction(run, row) * decode_map(run.store.read(row["attribution_path"]))
        except (OSError, BadImage):
            continue


def inducing(run: Run, records: pd.DataFrame) -> bool:
    """Whether any finished record induces a finding."""
    kinds = finished(records)[["label", "prompt"]].drop_duplicates().to_dict("records")
    return any(direction(run, kind) < 0 for kind in kinds)


def settings_line(run: Run) -> str:
    """Method, sampling settings, model and seed in one line; swept settings with all their values."""
    swept = dict(run.keys["sweep"])
    values = {key: ", ".join(f"{v}" for v in swept.get(key, [run.keys[key]])) for key in SWEEPABLE}
    return " · ".join(
        [
            values["method"],
            f"strength {values['strength']}",
            f"guidance {values['guidance_scale']}",
            f"{values['num_inference_steps']} steps",
            f"scheduler {values['scheduler']}",
            f"prompt “{values['prompt']}”",
            f"model {run.about['keys']['model_digest'][:12]}",
            f"seed {run.about['keys']['seed']}",
        ]
    )


def ranking(run: Run, records: pd.DataFrame) -> tuple[str, str]:
    """The column by which images are ranked, and its name: the judge's probability of healthy for the counterfactual if
    there is a judge that does better than chance and no finding is induced, else SSIM."""
    ok = finished(records)
    quality = judge_quality(run)
    guesses = quality is not None and bool(quality.problem)
    if ok["judge_counterfactual"].notna().all() and not inducing(run, ok) and not guesses:
        return "judge_counterfactual", "the judge's probability of healthy"
    return "ssim", "SSIM"


def spanning(run: Run, records: pd.DataFrame) -> list[tuple[str, Record]]:
    """(rank, record) of the highest, the median and the lowest image of each class, by ``ranking`` and record id.

    Ranked by the judge, images judged abnormal before and healthy after come first, and the highest of them is named
    best."""
    column, _ = ranking(run, records)
    ok = finished(records)
    flipped = (ok["judge_image"].astype(float) <= 0.5) & (ok["judge_counterfactual"].astype(float) > 0.5)
    ok = ok.assign(flipped=flipped & (column != "ssim"))
    chosen: list[tuple[str, Record]] = []
    for label in sorted(ok["label"].value_counts().sort_index().nlargest(MAX_GRID_CLASSES).index):
        scores = ok.loc[ok["label"] == label, ["flipped", column, "record_id"]]
        ranked = scores.sort_values(["flipped", column, "record_id"], ascending=[False, False, True]).index
        positions = dict.fromkeys((0, (len(ranked) - 1) // 2, len(ranked) - 1))
        rows = as_records(ok.loc[[ranked[n] for n in positions]])
        names = ("best" if scores.loc[ranked[0], "flipped"] else "highest", "median", "lowest")
        chosen += zip(names, rows)
    return chosen


@dataclass(frozen=True)
class ShownRecord:
    """A record of a figure."""

    row: Record
    images: RecordImages
    truth: Truth
    sign: int  # 1: a finding is removed; -1: a finding is induced

    @classmethod
    def read(cls, run: Run, row: Record, lesions: Lesions) -> ShownRecord | None:
        """Read a record; None if an image is missing now."""
        try:
            return cls(row, read_images(run, row), read_truth(run, row, lesions), direction(run, row))
        except (OSError, BadImage):
            return None

    def red(self, threshold: float) -> Image:
        """The red overlay, inside the lungs where their mask is known."""
        return overlay(self.images.image, self.sign * self.images.signed_map, threshold, self.truth.lungs)


def _read_records(run: Run, chosen: Sequence[tuple[str, Record]]) -> list[tuple[str, ShownRecord]]:
    """The chosen (rank, record) whose images can be read."""
    paths = [row["image_path"] for _, row in chosen]
    lesions = {} if any(row["lesion_mask_path"] for _, row in chosen) else own_shapes(run, paths)
    read = [(rank, ShownRecord.read(run, row, lesions)) for rank, row in chosen]
    return [(rank, record) for rank, record in read if record is not None]


def own_shapes(run: Run, paths: Sequence[str]) -> Lesions:
    """The lesions of the images ``paths`` that their data set outlines.

    A ``boxes.csv`` is found as by ``open_dataset``, but without listing the data set; only a data set with other
    outlines is opened. Empty if there is no usable file."""
    folders = {path.split("/")[0] for path in paths}
    for name in ("boxes.csv", *(f"{folder}/boxes.csv" for folder in folders if len(folders) == 1)):
        try:
            return match(parse(run.data.read(name), name), paths)
        except OSError:
            continue
        except UnusableData:
            return {}
    return lesion_shapes(run.about["data"], run.recipe.data, None, []) if run.about.get("outlined") else {}


def figure_grid(run: Run, records: pd.DataFrame | None = None) -> Figure:
    """Draw a row per image with counterfactual, overlay, signed map and, if known, the ground truth. Raises ValueError
    when no image of the run can be shown.
    """
    records = read_records(run) if records is None else records
    chosen = _read_records(run, spanning(run, records))
    if not chosen:
        raise ValueError(f"{run.store.uri}: no finished image to show")
    scale = map_scale(run, records)
    with_truth = any(record.truth.counterfactual is not None for _, record in chosen)
    with_lesion = any(record.truth.lesion is not None for _, record in chosen)
    titles = ["image", "counterfactual", "overlay", "signed map"]
    titles += ["ground truth"] * with_truth + ["lesion outline"] * with_lesion
    rows = []
    for rank, record in chosen:
        row, images, truth = record.row, record.images, record.truth
        lines = [f"SSIM {row['ssim']:.3f}", rank]
        if tables.known(row["judge_image"]):
            lines.insert(1, f"healthy {row['judge_image']:.2f} → {row['judge_counterfactual']:.2f}")
        both = changes(images.image, images.signed_map, scale.threshold, truth.lungs)
        map_panels = both, diverging(images.signed_map, scale.limit)
        panels = [Panel(pixels) for pixels in (images.image, images.counterfactual, *map_panels)]
        panels += [Panel(truth.counterfactual)] * with_truth
        panels += [Panel(None if truth.lesion is None else images.image, truth.lesion)] * with_lesion
        rows.append(PanelRow(short(row["label"], 60), lines, panels, marks(row["view"], row["spacing"], row["width"])))
    legend = "".join(f"{text[0].upper()}{text[1:]}. " for text in legend_of(row.marks for row in rows))
    caption = (
        f"Rows of each class: highest, median and lowest image by {ranking(run, records)[1]}; best: judged "
        f"abnormal before and healthy after. Overlay: orange, M > τ, was taken away; blue, −M > τ, was put in; τ = "
        f"{scale.threshold:.3g} ({scale.threshold_from}), inside the lungs where their mask is known. "
        f"{legend}{settings_line(run)}."
    )
    return panel_sheet(rows, titles, [caption], scale, bar=3)


def distributions(run: Run, records: pd.DataFrame | None = None) -> Figure:
    """Draw SSIM, map energy and, with a judge, its probabilities for image and counterfactual: one point per
    image, by class. Raises ValueError when no record is finished."""
    # layout
    ok = finished(read_records(run) if records is None else records)
    if ok.empty:
        raise ValueError(f"{run.store.uri}: no finished image to show")
    judged = ok.dropna(subset=["judge_image", "judge_counterfactual"])
    counts = ok["label"].value_counts().sort_index()
    labels = sorted(counts.nlargest(MAX_STRIPS).index)
    panels = 3 if len(judged) else 2
    breadth = max(2.9, 0.85 * len(labels) + 0.5)
    shape = (1, panels) if len(labels) <= 4 else (panels, 1)
    figure = Figure(figsize=(breadth * shape[1], 3.5 * shape[0]), facecolor="white", layout="constrained")
    axes = figure.subplots(*shape, squeeze=False).ravel()
    # panels
    for panel, column, title in ((axes[0], "ssim", "SSIM, image and counterfactual"),
                                 (axes[1], "attribution_energy", "Map energy, mean |M|")):  # fmt: skip
        for n, label in enumerate(labels):
            values = ok.loc[ok["label"] == label, column].to_numpy(float)
            strip(panel, n, values, CLASS_COLOURS[n % len(CLASS_COLOURS)], spread=0.26)
        _classes(panel, title, [f"{short(label, 15)}\nn = {counts[label]}" for label in labels])
    axes[1].set_ylim(bottom=0)
    if panels == 3:
        _before_and_after(axes[2], judged, labels)
    # note below
    note = "Points: images; bar: median and middle half of all images."
    if counts.max() > MAX_POINTS:
        note += f" At most {MAX_POINTS} points of a class are drawn."
    if len(counts) > MAX_STRIPS:
        note += f" The {MAX_STRIPS} largest of {len(counts)} classes."
    figure.supxlabel(note, fontsize=6.5, color=MUTED, x=0.01, ha="left")
    return figure


def _before_and_after(axes: Axes, judged: pd.DataFrame, labels: Sequence[str]) -> None:
    names = []
    for n, label in enumerate(labels):
        rows = judged[judged["label"] == label]
        names.append(f"{short(label, 15)}\nn = {len(rows)}")
        colour = CLASS_COLOURS[n % len(CLASS_COLOURS)]
        strip(axes, n - 0.2, rows["judge_image"].to_numpy(float), "#9aa5ad", spread=0.13)
        strip(axes, n + 0.2, rows["judge_counterfactual"].to_numpy(float), colour, spread=0.13)
    axes.axhline(0.5, color=MUTED, linewidth=0.7, linestyle=(0, (4, 3)), zorder=0)
    axes.set_ylim(-0.03, 1.03)
    _classes(axes, "Judge's probability of healthy", names)
    note = "grey: image · colour: counterfactual"
    axes.text(1, 1.015, note, fontsize=6.5, color=MUTED, ha="right", transform=axes.transAxes)


def _classes(axes: Axes, title: str, names: Sequence[str]) -> None:
    style(axes, title, grid="y")
    axes.set_xticks(range(len(names)), names, fontsize=7, color=INK, parse_math=False, linespacing=1.4)
    axes.set_xlim(-0.55, len(names) - 0.45)
    axes.tick_params(axis="x", pad=6)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")


def write_figures(run: Run, records: pd.DataFrame | None = None) -> list[str]:
    """Draw ``figures/grid`` and ``figures/distributions`` in all FORMATS, and return their paths.

    A figure without any image to show is left out."""
    records = read_records(run) if records is None else records
    written = []
    for name, draw in (("grid", figure_grid), ("distributions", distributions)):
        try:
            figure = draw(run, records)
        except ValueError:
            continue
        for kind in FORMATS:
            run.store.put(f"figures/{name}.{kind}", render(figure, kind))
            written.append(f"figures/{name}.{kind}")
    return written
