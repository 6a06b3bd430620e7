"""Figures of a run: a grid of selected images, and the distributions of the scores."""

from __future__ import annotations

import itertools
import textwrap
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
from diffva_ray.evaluate.direction import direction
from diffva_ray.evaluate.drawing import (
    CLASS_COLOURS,
    INK,
    MUTED,
    RULE,
    Scale,
    colour_bar,
    colour_limit,
    diverging,
    outline,
    overlay,
    png,
    short,
)
from diffva_ray.evaluate.records import (
    Boxes,
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
MAX_GRID_CLASSES, MAX_STRIPS, MAX_POINTS = 4, 8, 300  # classes in the grid and in the distributions, points per class
PANEL, GAP, LEFT, TOP, LINE = 1.12, 0.045, 1.32, 0.30, 0.135  # inches


def map_scale(run: Run, records: pd.DataFrame) -> Scale:
    """One colour scale for the whole run.

    The threshold is that of a validation run, else this run's own, else a quantile of its maps; ``threshold_from``
    names which."""
    values = np.concatenate([signed.ravel() for signed in _sampled_maps(run, records)] or [np.zeros(1, np.float32)])
    limit = colour_limit(values)
    for row in (reduced_metrics(run) or {}).get("localization", []):
        if row["map"] == "positive" and row.get("threshold") is not None:
            return Scale(row["threshold"], f"fixed on {row['threshold_from']}", limit)
    own = read_json(run, tables.THRESHOLDS_FILE) or {}
    if "positive" in own:
        return Scale(own["positive"], "the best mean Dice of these same images", limit)
    threshold = max(float(np.quantile(values, QUANTILE)), 1e-3)
    return Scale(threshold, f"the {QUANTILE:.0%} quantile of this run's maps", limit)


def _sampled_maps(run: Run, records: pd.DataFrame) -> Iterator[Image]:
    """Yields maps evenly sampled from the run, with the sign in which they are shown red."""
    ok = finished(records[["status", "label", "prompt", "attribution_path"]]).sort_values("attribution_path")
    for row in ok[:: max(len(ok) // SAMPLED_MAPS, 1)][:SAMPLED_MAPS].to_dict("records"):
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
    there is a judge and no finding is induced, else SSIM."""
    ok = finished(records)
    if ok["judge_counterfactual"].notna().all() and not inducing(run, ok):
        return "judge_counterfactual", "the judge's probability of healthy"
    return "ssim", "SSIM"


def spanning(run: Run, records: pd.DataFrame) -> list[tuple[str, Record]]:
    """(rank, record) of the highest, the median and the lowest image of each class, by ``ranking`` and record id."""
    column, _ = ranking(run, records)
    ok = finished(records)
    chosen: list[tuple[str, Record]] = []
    for label in sorted(ok["label"].value_counts().sort_index().nlargest(MAX_GRID_CLASSES).index):
        scores = ok.loc[ok["label"] == label, [column, "record_id"]]
        ranked = scores.sort_values([column, "record_id"], ascending=[False, True]).index
        positions = dict.fromkeys((0, (len(ranked) - 1) // 2, len(ranked) - 1))
        rows = as_records(ok.loc[[ranked[n] for n in positions]])
        chosen += zip(("highest", "median", "lowest"), rows)
    return chosen


@dataclass(frozen=True)
class GridRow:
    """One row of the grid."""

    rank: str  # highest, median, lowest
    row: Record
    images: RecordImages
    truth: Truth


def _read_rows(run: Run, chosen: Sequence[tuple[str, Record]]) -> list[GridRow]:
    paths = [row["image_path"] for _, row in chosen]
    boxes = {} if any(row["lesion_mask_path"] for _, row in chosen) else own_boxes(run, paths)
    rows = []
    for rank, row in chosen:
        try:
            rows.append(GridRow(rank, row, read_images(run, row), read_truth(run, row, boxes)))
        except (OSError, BadImage):
            continue  # leave out an image that is missing now
    return rows


def own_boxes(run: Run, paths: Sequence[str]) -> Boxes:
    """The lesion boxes of the images ``paths`` in the ``boxes.csv`` of their data set.

    The file is found as by ``open_dataset``, but without listing the data set. Empty if there is no usable file."""
    folders = {path.split("/")[0] for path in paths}
    for name in ("boxes.csv", *(f"{folder}/boxes.csv" for folder in folders if len(folders) == 1)):
        try:
            return match(parse(run.data.read(name), name), paths)
        except OSError:
            continue
        except UnusableData:
            return {}
    return {}


def figure_grid(run: Run, records: pd.DataFrame | None = None) -> bytes:
    """Draw a PNG like the paper's figures 2 and 3: a row per image with counterfactual, overlay, signed map and, if
    known, the ground truth. Raises ValueError when no image of the run can be shown.
    """
    # content
    records = read_records(run) if records is None else records
    rows = _read_rows(run, spanning(run, records))
    if not rows:
        raise ValueError(f"{run.store.uri}: no finished image to show")
    scale = map_scale(run, records)
    columns = ["image", "counterfactual", "red overlay", "signed map"]
    if any(row.truth.counterfactual is not None for row in rows):
        columns.append("ground truth")
    if any(row.truth.lesion is not None for row in rows):
        columns.append("lesion outline")
    # layout in inches; classes are separated by a wider gap
    offsets = [0.0]
    for before, after in itertools.pairwise(rows):
        offsets.append(offsets[-1] + PANEL + GAP * (4 if before.row["label"] != after.row["label"] else 1))
    width = LEFT + len(columns) * (PANEL + GAP) + 0.1
    caption = textwrap.wrap(_caption(run, records, rows, scale), int(width * 21.5))
    foot = 0.52 + LINE * len(caption)
    height = TOP + offsets[-1] + PANEL + foot
    # panels
    figure = Figure(figsize=(width, height), facecolor="white")
    for offset, row in zip(offsets, rows):
        bottom = height - TOP - offset - PANEL
        _row_label(figure, row, 0.1 / width, (bottom + PANEL / 2) / height)
        for n, title in enumerate(columns):
            axes = figure.add_axes(((LEFT + n * (PANEL + GAP)) / width, bottom / height, PANEL / width, PANEL / height))
            axes.set_axis_off()
            _panel(axes, title, row, scale, direction(run, row.row))
            if offset == 0:
                axes.set_title(title, fontsize=8, color=INK, pad=4)
    colour_bar(figure, scale, (LEFT + 3 * (PANEL + GAP)) / width, (foot - 0.13) / height, PANEL / width, height)
    figure.text(0.1 / width, 0.1 / height, "\n".join(caption), fontsize=6.5, color=MUTED, va="bottom", parse_math=False,
                linespacing=1.45)  # fmt: skip
    return png(figure)


def _caption(run: Run, records: pd.DataFrame, rows: Sequence[GridRow], scale: Scale) -> str:
    signs = {"M" if direction(run, row.row) > 0 else "−M (inducing)" for row in rows}
    text = (
        f"Rows of each class: highest, median and lowest image by {ranking(run, records)[1]}. Red: "
        f"{' or '.join(sorted(signs))} > τ = {scale.threshold:.3g} ({scale.threshold_from}), inside the lungs where "
        f"their mask is known. {settings_line(run)}."
    )
    return " ".join(text.split())


def _row_label(figure: Figure, image: GridRow, x: float, y: float) -> None:
    row = image.row
    lines = [f"SSIM {row['ssim']:.3f}"]
    if tables.known(row["judge_image"]):
        lines.append(f"healthy {row['judge_image']:.2f} → {row['judge_counterfactual']:.2f}")
    lines.append(image.rank)
    name = short(row["label"], 17)
    figure.text(x, y, "\n".join(["", *lines]), fontsize=6.8, color=MUTED, va="center", linespacing=1.5)
    top = y + (len(lines) * 6.8 * 1.5 / 2 / 72) / figure.get_figheight()
    figure.text(x, top, name, fontsize=8, color=INK, weight="bold", va="center", parse_math=False)


def _panel(axes: Axes, title: str, image: GridRow, scale: Scale, sign: int) -> None:
    images, truth = image.images, image.truth
    if (title == "ground truth" and truth.counterfactual is None) or (
        title == "lesion outline" and truth.lesion is None
    ):
        axes.text(0.5, 0.5, "unknown", fontsize=6.5, color=MUTED, ha="center", va="center", transform=axes.transAxes)
        return
    panels = {
        "counterfactual": images.counterfactual,
        "red overlay": overlay(images.image, sign * images.signed_map, scale.threshold, truth.lungs),
        "signed map": diverging(images.signed_map, scale.limit),
        "ground truth": images.image if truth.counterfactual is None else truth.counterfactual,
    }
    axes.imshow(panels.get(title, images.image), cmap="gray", vmin=0, vmax=1, interpolation="bicubic")
    if title == "lesion outline":
        outline(axes, truth.lesion)


def distributions(run: Run, records: pd.DataFrame | None = None) -> bytes:
    """Draw a PNG with SSIM, map energy and, with a judge, its probabilities for image and counterfactual: one point per
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
            _strip(panel, n, ok.loc[ok["label"] == label, column], CLASS_COLOURS[n % len(CLASS_COLOURS)])
        _decorate(panel, title, [f"{short(label, 15)}\nn = {counts[label]}" for label in labels])
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
    return png(figure)


def _before_and_after(axes: Axes, judged: pd.DataFrame, labels: Sequence[str]) -> None:
    names = []
    for n, label in enumerate(labels):
        rows = judged[judged["label"] == label]
        names.append(f"{short(label, 15)}\nn = {len(rows)}")
        colour = CLASS_COLOURS[n % len(CLASS_COLOURS)]
        _strip(axes, n - 0.2, rows["judge_image"], "#9aa5ad", spread=0.13)
        _strip(axes, n + 0.2, rows["judge_counterfactual"], colour, spread=0.13)
    axes.axhline(0.5, color=MUTED, linewidth=0.7, linestyle=(0, (4, 3)), zorder=0)
    axes.set_ylim(-0.03, 1.03)
    _decorate(axes, "Judge's probability of healthy", names)
    axes.text(
        1,
        1.015,
        "grey: image · colour: counterfactual",
        fontsize=6.5,
        color=MUTED,
        ha="right",
        transform=axes.transAxes,
    )


def _strip(axes: Axes, x: float, values: pd.Series, colour: str, spread: float = 0.26) -> None:
    numbers = np.sort(values[np.isfinite(values)].to_numpy(float))
    if not len(numbers):
        return
    low, middle, high = np.quantile(numbers, [0.25, 0.5, 0.75])
    drawn = numbers[np.linspace(0, len(numbers) - 1, min(len(numbers), MAX_POINTS)).round().astype(int)]
    golden = (np.arange(len(drawn)) * 0.6180339887) % 1  # evenly scattered and reproducible
    axes.scatter(x + spread * (2 * golden - 1), drawn, s=7, color=colour, alpha=0.45, linewidths=0)
    axes.plot([x, x], [low, high], color=INK, linewidth=2.4, solid_capstyle="butt")
    axes.plot([x - 0.8 * spread, x + 0.8 * spread], [middle, middle], color=INK, linewidth=1.4)


def _decorate(axes: Axes, title: str, names: Sequence[str]) -> None:
    axes.set_title(title, fontsize=8.5, color=INK, loc="left", pad=14, weight="bold")
    axes.set_xticks(range(len(names)), names, fontsize=7, color=INK, parse_math=False, linespacing=1.4)
    axes.set_xlim(-0.55, len(names) - 0.45)
    axes.tick_params(axis="y", labelsize=7, colors=MUTED, length=0)
    axes.tick_params(axis="x", length=0, pad=6)
    axes.grid(axis="y", color="#e6eaed", linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set(visible=side == "bottom", color=RULE, linewidth=0.8)


def write_figures(run: Run, records: pd.DataFrame | None = None) -> list[str]:
    """Draw ``figures/grid.png`` and ``figures/distributions.png``, and return their paths.

    A figure without any image to show is left out."""
    records = read_records(run) if records is None else records
    written = []
    for path, draw in (("figures/grid.png", figure_grid), ("figures/distributions.png", distributions)):
        try:
            figure = draw(run, records)
        except ValueError:
            continue
        run.store.put(path, figure)
        written.append(path)
    return written
