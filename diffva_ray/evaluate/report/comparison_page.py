"""The page of two runs on the same images: numbers side by side, and the images that differ most and least.

Like the report, it loads only the images beside it; it has no script.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import binary_dilation

from diffva_ray.data.dataset import UnusableData
from diffva_ray.data.encoding import encode_png, quantise
from diffva_ray.data.images import BadImage
from diffva_ray.evaluate.annotations import lesion_boxes
from diffva_ray.evaluate.comparison import BY_KEY, ComparedMetric, Comparison, setting_text
from diffva_ray.evaluate.drawing import CLASS_COLOURS, INK, MUTED, OUTLINE, RULE, diverging, png, short
from diffva_ray.evaluate.figures import map_scale, settings_line
from diffva_ray.evaluate.records import read_images, read_records, read_truth
from diffva_ray.evaluate.report.assets import render_page
from diffva_ray.evaluate.report.numbers import Card, Cell, Group, Table, class_name, count, number, plain, text_table
from diffva_ray.evaluate.tables import ALL, clean, known
from diffva_ray.generate.run import Run
from diffva_ray.generate.run_json import RUN
from diffva_ray.schema import Row
from diffva_ray.storage.store import Store, is_local, join, open_store

PAGE, METRICS, SCATTER = "index.html", "metrics.json", "images/images.png"
PANEL = re.compile(r"images/\d\d-(image|counterfactual-a|map-a|counterfactual-b|map-b|truth)\.png")
N_MOST, N_MEDIAN, N_LEAST = 6, 3, 3  # images of each group
MIN_SIDE, MAX_SIDE = 192, 320  # pixels of a panel's side
CARDS = ("auroc", "dice_fixed", "flip_rate", "lesion_error_ratio", "ssim", "attribution_energy")
RANKED_BY = ("auroc", "confidence_gain", "ssim")  # the first measure that both runs have ranks the images
LESION = "known lesion"  # caption of the panel with the outlined lesion


@dataclass(frozen=True)
class ExampleImage:
    """One image of the page."""

    label: str
    path: str
    varied: str  # swept settings and sample number, where an image has several records
    scores: list[tuple[str, str, str, str]]  # (measure, in A, in B, B - A)
    panels: list[tuple[str, str, str]]  # (caption, file, alternative text)


def output_store(a: Run, b: Run, out: str | None) -> Store:
    """The folder of the page: ``out``, or ``compare-<A>-<B>`` beside a local run A.

    Raises UnusableData if ``out`` is required or lies inside a run: runs are never written to.
    """
    names = [run.store.uri.rstrip("/").rpartition("/")[2] for run in (a, b)]
    if out is None:
        if not is_local(a.store.uri):
            raise UnusableData(f"--out is needed: {a.store.uri} is not on a local disk")
        out = join(a.store.uri.rpartition("/")[0] or "/", f"compare-{names[0]}-{names[1]}")
    try:
        store = open_store(out)
    except ValueError as error:
        raise UnusableData(f"--out {error}") from None
    for run in (a, b):
        if f"{_real(store.uri)}/".startswith(f"{_real(run.store.uri)}/"):
            raise UnusableData(f"--out {out}: inside the run {run.store.uri}; choose a folder outside")
    if store.exists(RUN):
        raise UnusableData(f"--out {out}: this is a run; choose another folder")
    return store


def _real(uri: str) -> str:
    return os.path.realpath(uri) if is_local(uri) else uri.rstrip("/")


def write_comparison(comparison: Comparison, store: Store) -> str:
    """Write ``metrics.json``, ``index.html`` and its images, replace earlier ones, and return the URI of the page."""
    measure = ranking(comparison)
    store.put(METRICS, json.dumps(clean(comparison.metrics()), indent=1, ensure_ascii=False).encode())
    groups, limit, unreadable = _write_images(comparison, measure, store)
    store.put(SCATTER, scatter(comparison, measure))
    kept = {join("images", file) for _, images in groups for image in images for _, file, _ in image.panels}
    for entry in store.list("images"):
        if PANEL.fullmatch(entry.path) and entry.path not in kept:  # of an earlier page
            store.delete(entry.path)
    store.put(PAGE, render(comparison, measure, groups, limit, unreadable).encode())
    return join(store.uri, PAGE)


def ranking(comparison: Comparison) -> ComparedMetric:
    """The measure by which the images are ranked."""
    return BY_KEY[next(key for key in RANKED_BY if comparison.row(key) is not None)]


def chosen(comparison: Comparison, measure: ComparedMetric) -> list[tuple[str, list[int]]]:
    """Groups of images that differ most, medium and least by ``measure``, as (heading, positions in ``pairs``).

    Each image is in one group; ties keep the order of the images.
    """
    gaps = (comparison.pairs[f"{measure.key}_b"] - comparison.pairs[f"{measure.key}_a"]).abs()
    order = gaps.dropna().sort_values(ascending=False, kind="stable").index.tolist()
    largest, rest = order[:N_MOST], order[N_MOST:]
    smallest, rest = rest[len(rest) - min(N_LEAST, len(rest)) :], rest[: max(len(rest) - N_LEAST, 0)]
    start = min(max(len(order) // 2 - len(largest) - N_MEDIAN // 2, 0), max(len(rest) - N_MEDIAN, 0))
    groups = [
        ("Largest difference", largest),
        ("Median difference", rest[start : start + N_MEDIAN]),
        ("Smallest difference", smallest),
    ]
    return [(title, images) for title, images in groups if images]


def _write_images(
    comparison: Comparison, measure: ComparedMetric, store: Store
) -> tuple[list[tuple[str, list[ExampleImage]]], float, int]:
    """The images by group, the colour limit of all maps, and the number of images that can no longer be read."""
    runs = (comparison.a, comparison.b)
    limit = max(map_scale(run, read_records(run)).limit for run in runs)
    boxes = lesion_boxes(comparison.a.about["data"], None, [])
    groups, written, unreadable = [], 0, 0
    for title, positions in chosen(comparison, measure):
        examples: list[ExampleImage] = []
        for position in positions:
            pair = comparison.pairs.loc[position]
            try:
                pixels_of = _panels(runs, (pair["record_a"], pair["record_b"]), boxes, limit)
            except (OSError, BadImage):
                unreadable += 1
                continue
            panels = []
            for name, caption, pixels in pixels_of:
                file = f"{written:02d}-{name}.png"
                store.put(f"images/{file}", encode_png(quantise(pixels)))
                panels.append((caption, file, f"{plain(pair['label'])}, {pair['image_path']}: {caption}"))
            varied = [f"{plain(key)} {pair[key]}" for key in comparison.swept]
            if comparison.a.keys["samples"] > 1:
                varied.append(f"sample {pair['sample']}")
            examples.append(
                ExampleImage(pair["label"], pair["image_path"], ", ".join(varied), _scores(pair, measure), panels)
            )
            written += 1
        groups.append((title, examples))
    return [(title, examples) for title, examples in groups if examples], limit, unreadable


def _panels(
    runs: tuple[Run, Run], rows: tuple[Row, Row], boxes: Any, limit: float
) -> list[tuple[str, str, NDArray[np.float32]]]:
    """(file name, caption, pixels [side, side, 3]) of one image; a known lesion is outlined on the maps."""
    images = [read_images(run, row) for run, row in zip(runs, rows)]
    lesion = read_truth(runs[0], {**rows[0], "ground_truth_path": None}, boxes).lesion
    side = min(max(MIN_SIDE, *(pair.image.shape[0] for pair in images)), MAX_SIDE)
    edge = None if lesion is None else _edge(lesion, side)
    image = _resized(images[0].image, side)
    panels = [("image", "image", image)]
    for letter, pair in zip("ab", images):
        name = letter.upper()
        panels += [
            (f"counterfactual-{letter}", f"counterfactual {name}", _resized(pair.counterfactual, side)),
            (f"map-{letter}", f"map {name}", _outlined(_resized(diverging(pair.signed_map, limit), side), edge, INK)),
        ]
    if edge is not None:
        panels.append(("truth", LESION, _outlined(image, edge, OUTLINE)))
    return panels


def _resized(pixels: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """A grey [H, W] or coloured [H, W, 3] image as [side, side, 3]."""
    channels = [pixels] * 3 if pixels.ndim == 2 else [pixels[..., n] for n in range(3)]
    images = [Image.fromarray(np.ascontiguousarray(channel, np.float32)) for channel in channels]
    resized = [np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) for image in images]
    return np.clip(np.stack(resized, axis=2), 0, 1)


def _edge(lesion: NDArray[np.bool_], side: int) -> NDArray[np.bool_]:
    """The pixels around the lesion, two wide, on the grid of the panels."""
    mask = np.asarray(Image.fromarray(lesion.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)) > 0.5
    return binary_dilation(mask, iterations=2) & ~mask


def _outlined(pixels: NDArray[np.float32], edge: NDArray[np.bool_] | None, colour: str) -> NDArray[np.float32]:
    result = pixels.copy()
    if edge is not None:
        result[edge] = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    return result


def _scores(pair: pd.Series, measure: ComparedMetric) -> list[tuple[str, str, str, str]]:
    scores: list[tuple[str, str, str, str]] = []
    for key in dict.fromkeys((measure.key, "ssim", "lesion_error_ratio")):
        if f"{key}_a" not in pair:
            continue
        values = [pair[f"{key}_{side}"] / pair.get(f"{key}_of_{side}", 1.0) for side in "ab"]
        if all(np.isfinite(values)):
            kind = BY_KEY[key]
            gap = signed(kind, values[1] - values[0])
            scores.append((kind.name or kind.title, form(kind, values[0]), form(kind, values[1]), gap))
    return scores


DIGITS = {"l1": 4, "attribution_energy": 4, "ground_truth_psnr": 1}  # decimals by measure; three for all others


def form(measure: ComparedMetric, value: float) -> str:
    """A value of a measure as text."""
    if measure.form == "percent":
        return f"{number(100 * value, 1)}\u00a0%" if known(value) else "–"
    return number(value, DIGITS.get(measure.key, 3))


def signed(measure: ComparedMetric, value: float) -> str:
    """A difference as text with its sign, in percentage points for percentages; without a sign if it rounds to zero."""
    text = form(measure, value).replace("%", "pp")
    if not any(digit in text for digit in "123456789"):
        return text.removeprefix("−")
    return text if value < 0 else f"+{text}"


def cards(comparison: Comparison) -> list[Card]:
    """The key differences, of measures that both runs have."""
    results = []
    for key in CARDS:
        row = comparison.row(key)
        if row is not None:
            measure = BY_KEY[key]
            detail = f"A {form(measure, row['a'])}, B {form(measure, row['b'])}\n{_interval(measure, row)}"
            detail += f"\n{row['better'].upper()} is better" if row["better"] else ""
            results.append(Card(measure.name or measure.title, signed(measure, row["difference"]), detail))
    return results


def _interval(measure: ComparedMetric, row: Row) -> str:
    low, high = row["interval"]
    return "no interval" if low != low else f"{signed(measure, low)} to {signed(measure, high)}"


def difference_table(comparison: Comparison) -> Table:
    """All measures, all classes first; the better run is marked where the interval excludes zero."""
    names = comparison.names
    heads = [("", False), ("images", True), (f"A {names[0]}", True), (f"B {names[1]}", True), ("B − A", True),
             ("95 % interval", True), ("better", False)]  # fmt: skip
    groups = []
    labels = dict.fromkeys(row["label"] for row in comparison.rows)
    for label in sorted(labels, key=lambda label: (label != ALL, label)):
        body = []
        for row in (row for row in comparison.rows if row["label"] == label):
            measure = BY_KEY[row["measure"]]
            cells = [
                Cell(measure.title, False),
                Cell(count(row["n"])),
                Cell(form(measure, row["a"]), True, row["better"] == "a"),
                Cell(form(measure, row["b"]), True, row["better"] == "b"),
                Cell(signed(measure, row["difference"])),
                Cell(_interval(measure, row)),
                Cell(_better(measure, row), False),
            ]
            body.append(("", cells))
        groups.append(Group(class_name(label), body))
    caption = (
        "Means over the images that both runs have; the flip rate is over images that the judges of both runs call "
        "abnormal. Intervals by paired bootstrap over images, separately for each number. A run is named better where "
        "the interval excludes zero and the measure has a good direction."
    )
    return Table("numbers", "Numbers", caption, heads, groups)


def _better(measure: ComparedMetric, row: Row) -> str:
    if not measure.better:
        return "–"
    return row["better"].upper() if row["better"] else "not clear"


def scatter(comparison: Comparison, measure: ComparedMetric) -> bytes:
    """PNG with ``measure`` of every image in A against B, and the distribution of the differences, by class."""
    pairs = comparison.pairs.dropna(subset=[f"{measure.key}_a", f"{measure.key}_b"])
    labels = sorted(pairs["label"].value_counts().nlargest(len(CLASS_COLOURS)).index)
    figure = Figure(figsize=(8.4, 3.7), facecolor="white", layout="constrained")
    plane, strip = figure.subplots(1, 2, width_ratios=(1, 1.25))
    ends = pairs[[f"{measure.key}_a", f"{measure.key}_b"]].to_numpy(float)
    margin = 0.04 * max(float(np.ptp(ends)), 1e-3)
    low, high = float(ends.min()) - margin, float(ends.max()) + margin
    plane.plot([low, high], [low, high], color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    for n, label in enumerate(labels):
        rows = pairs[pairs["label"] == label]
        in_a, in_b = rows[f"{measure.key}_a"], rows[f"{measure.key}_b"]
        name = f"{short(label, 18)}, n = {len(rows)}"
        plane.scatter(in_a, in_b, s=11, color=CLASS_COLOURS[n], alpha=0.55, linewidths=0, label=name)
        _spread(strip, n, (in_b - in_a).to_numpy(float), CLASS_COLOURS[n])
    plane.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    names = [short(name, 24) for name in comparison.names]
    plane.set_xlabel(f"A  {names[0]}", fontsize=8, color=INK, parse_math=False)
    plane.set_ylabel(f"B  {names[1]}", fontsize=8, color=INK, parse_math=False)
    strip.axvline(0, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    strip.set_yticks(
        range(len(labels)), [short(label, 18) for label in labels], fontsize=8, color=INK, parse_math=False
    )
    strip.set_ylim(len(labels) - 0.5, -0.5)
    strip.set_xlabel("B − A; bar: median and middle half", fontsize=8, color=INK)
    for axes, title in ((plane, f"{measure.title}: one point per image"), (strip, "Difference on each image")):
        axes.set_title(title, fontsize=9, color=INK, loc="left", weight="bold", pad=8)
        axes.tick_params(labelsize=7, colors=MUTED, length=0)
        axes.grid(color="#e6eaed", linewidth=0.7)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set(color=RULE, linewidth=0.8)
    return png(figure)


def _spread(axes: Axes, y: float, gaps: NDArray[np.float64], colour: str) -> None:
    golden = (np.arange(len(gaps)) * 0.6180339887) % 1  # even and deterministic jitter
    axes.scatter(np.sort(gaps), y + 0.3 * (2 * golden - 1), s=8, color=colour, alpha=0.5, linewidths=0)
    low, middle, high = np.quantile(gaps, [0.25, 0.5, 0.75])
    axes.plot([low, high], [y, y], color=INK, linewidth=2.4, solid_capstyle="butt")
    axes.plot([middle, middle], [y - 0.24, y + 0.24], color=INK, linewidth=1.4)


def render(
    comparison: Comparison,
    measure: ComparedMetric,
    groups: list[tuple[str, list[ExampleImage]]],
    limit: float,
    unreadable: int,
) -> str:
    """The page as HTML."""
    settings = [(plain(name), setting_text(in_a), setting_text(in_b)) for name, in_a, in_b in comparison.settings]
    heads = ("setting", f"A {comparison.names[0]}", f"B {comparison.names[1]}")
    values = {
        "title": f"{' and '.join(comparison.names)} · diffva comparison",
        "names": comparison.names,
        "runs": [
            (letter, name, run.store.uri, settings_line(run), run.recipe.name, run.recipe.generate.map_name)
            for letter, name, run in zip("AB", comparison.names, (comparison.a, comparison.b))
        ],
        "counts": comparison.counts,
        "notes": comparison.notes,
        "settings": text_table("settings", "Settings that differ", "", heads, settings, "reasons sides"),
        "cards": cards(comparison),
        "table": difference_table(comparison),
        "measure": measure.title,
        "scatter": SCATTER,
        "groups": groups,
        "limit": limit,
        "unreadable": unreadable,
        "outlined": any(
            caption == LESION for _, images in groups for image in images for caption, _, _ in image.panels
        ),
    }
    return render_page("comparison.html", ("page.css", "comparison.css"), values)
