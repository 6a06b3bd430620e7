"""The page of two runs on the same images: numbers side by side, and the images that differ most and least.

Like the report, it loads only the images beside it; it has no script.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console

from diffva_ray.data.dataset import UnusableData
from diffva_ray.evaluate.annotations import lesion_shapes
from diffva_ray.evaluate.comparison import BY_KEY, ComparedMetric, Comparison, setting_text
from diffva_ray.evaluate.drawing import (
    CLASS_COLOURS,
    INK,
    Panel,
    PanelRow,
    Scale,
    diverging,
    panel_sheet,
    png,
    short,
    strip,
    style,
)
from diffva_ray.evaluate.figures import ShownRecord, map_scale, settings_line
from diffva_ray.evaluate.records import read_records
from diffva_ray.evaluate.report.assets import render_page
from diffva_ray.evaluate.report.numbers import (
    INTERVAL,
    Card,
    Cell,
    Group,
    Table,
    class_name,
    count,
    number,
    plain,
    text_table,
)
from diffva_ray.evaluate.summary import print_lines, print_table, terminal
from diffva_ray.evaluate.tables import ALL, clean, known
from diffva_ray.generate.run import Run
from diffva_ray.generate.run_json import RUN
from diffva_ray.schema import TableRow
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import Store, is_local, join

PAGE, METRICS, SCATTER = "index.html", "metrics.json", "images/images.png"
SHEET = "images/examples-{}.png"
TITLES = ("image", "counterfactual A", "map A", "counterfactual B", "map B", "known lesion")
N_MOST, N_MEDIAN, N_LEAST = 6, 3, 3  # images of each group
CARDS = ("auroc", "dice_fixed", "flip_rate", "lesion_error_ratio", "ssim", "attribution_energy")
RANKED_BY = ("auroc", "confidence_gain", "ssim")  # the first measure that both runs have ranks the images


@dataclass(frozen=True)
class Examples:
    """Images of the page that differ alike."""

    title: str
    names: list[str]  # of the images
    file: str  # their sheet


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
    store.put(SCATTER, scatter(comparison, measure))
    for number_of_group in range(3):  # of an earlier page
        store.delete(SHEET.format(number_of_group))
    groups, unreadable = write_examples(comparison, measure, store)
    store.put(PAGE, render(comparison, measure, groups, unreadable).encode())
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


def write_examples(comparison: Comparison, measure: ComparedMetric, store: Store) -> tuple[list[Examples], int]:
    """Draw a sheet of each group; returns the groups, and the number of images that can no longer be read."""
    runs = (comparison.a, comparison.b)
    limit = max(map_scale(run, read_records(run)).limit for run in runs)
    lesions = lesion_shapes(comparison.a.about["data"], comparison.a.recipe.data, None, [])
    groups, unreadable = list[Examples](), 0
    for title, positions in chosen(comparison, measure):
        rows, names = [], []
        for position in positions:
            pair = comparison.pairs.loc[position]
            a, b = (ShownRecord.read(run, pair[f"record_{side}"], lesions) for run, side in zip(runs, "ab"))
            if a is None or b is None:
                unreadable += 1
                continue
            lesion = a.truth.lesion
            panels = [Panel(a.images.image)]
            for shown in (a, b):
                panels += [Panel(shown.images.counterfactual), Panel(diverging(shown.images.signed_map, limit), lesion)]
            panels.append(Panel(None if lesion is None else a.images.image, lesion))
            names.append(f"{plain(pair['label'])}, {pair['image_path']}")
            rows.append(PanelRow(plain(pair["label"]), _lines(comparison, pair, measure), panels))
        if rows:
            file = SHEET.format(len(groups))
            foot = f"Maps of both runs: red where the image is brighter than its counterfactual, full at ±{limit:.2g}."
            store.put(file, png(panel_sheet(rows, TITLES, [foot], Scale(0, "", limit), bar=2, side=1.3)))
            groups.append(Examples(title, names, file))
    return groups, unreadable


def _lines(comparison: Comparison, pair: pd.Series, measure: ComparedMetric) -> list[str]:
    """File name, swept settings and scores of an image, for its row."""
    lines = [short(pair["image_path"].rpartition("/")[2], 26)]
    lines += [f"{plain(key)} {pair[key]}" for key in comparison.swept]
    if comparison.a.keys["samples"] > 1:
        lines.append(f"sample {pair['sample']}")
    for key in dict.fromkeys((measure.key, "ssim", "lesion_error_ratio")):
        if f"{key}_a" in pair:
            values = [pair[f"{key}_{side}"] / pair.get(f"{key}_of_{side}", 1.0) for side in "ab"]
            if all(np.isfinite(values)):
                kind = BY_KEY[key]
                lines += [kind.name or kind.title, f"  A {form(kind, values[0])}, B {form(kind, values[1])}"]
    return lines


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


def _interval(measure: ComparedMetric, row: TableRow) -> str:
    low, high = row["interval"]
    return "no interval" if low != low else f"{signed(measure, low)} to {signed(measure, high)}"


def difference_table(comparison: Comparison) -> Table:
    """All measures, all classes first; the better run is marked where the interval excludes zero."""
    names = comparison.names
    heads = [("", False), ("images", True), (f"A {names[0]}", True), (f"B {names[1]}", True), ("B − A", True),
             (INTERVAL, True), ("better", False)]  # fmt: skip
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
        "abnormal. Intervals by paired bootstrap over patients (images where these are unknown), separately for each "
        "number. A run is named better where the interval excludes zero and the measure has a good direction."
    )
    return Table("numbers", "Numbers", caption, heads, groups)


def _better(measure: ComparedMetric, row: TableRow) -> str:
    if not measure.better:
        return "–"
    return row["better"].upper() if row["better"] else "not clear"


def scatter(comparison: Comparison, measure: ComparedMetric) -> bytes:
    """PNG with ``measure`` of every image in A against B, and the distribution of the differences, by class."""
    pairs = comparison.pairs.dropna(subset=[f"{measure.key}_a", f"{measure.key}_b"])
    labels = sorted(pairs["label"].value_counts().nlargest(len(CLASS_COLOURS)).index)
    figure = Figure(figsize=(8.4, 3.7), facecolor="white", layout="constrained")
    plane, gaps = figure.subplots(1, 2, width_ratios=(1, 1.25))
    ends = pairs[[f"{measure.key}_a", f"{measure.key}_b"]].to_numpy(float)
    margin = 0.04 * max(float(np.ptp(ends)), 1e-3)
    low, high = float(ends.min()) - margin, float(ends.max()) + margin
    plane.plot([low, high], [low, high], color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    for n, label in enumerate(labels):
        rows = pairs[pairs["label"] == label]
        in_a, in_b = rows[f"{measure.key}_a"], rows[f"{measure.key}_b"]
        name = f"{short(label, 18)}, n = {len(rows)}"
        plane.scatter(in_a, in_b, s=11, color=CLASS_COLOURS[n], alpha=0.55, linewidths=0, label=name)
        strip(gaps, n, (in_b - in_a).to_numpy(float), CLASS_COLOURS[n], spread=0.3, across=True)
    plane.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    names = [short(name, 24) for name in comparison.names]
    plane.set_xlabel(f"A  {names[0]}", fontsize=8, color=INK, parse_math=False)
    plane.set_ylabel(f"B  {names[1]}", fontsize=8, color=INK, parse_math=False)
    gaps.axvline(0, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    gaps.set_yticks(range(len(labels)), [short(label, 18) for label in labels], fontsize=8, color=INK, parse_math=False)
    gaps.set_ylim(len(labels) - 0.5, -0.5)
    gaps.set_xlabel("B − A; bar: median and middle half", fontsize=8, color=INK)
    style(plane, f"{measure.title}: one point per image")
    style(gaps, "Difference on each image")
    return png(figure)


def settings_table(comparison: Comparison) -> Table:
    """The settings that differ."""
    rows = [(plain(name), setting_text(in_a), setting_text(in_b)) for name, in_a, in_b in comparison.settings]
    heads = ("setting", f"A {comparison.names[0]}", f"B {comparison.names[1]}")
    return text_table("settings", "Settings that differ", "", heads, rows, "reasons sides")


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print the settings that differ, the differences over all classes, the counts and the notes."""
    console = console or terminal()
    counts, numbers = comparison.counts, difference_table(comparison)
    print_lines(console, [f"A  {comparison.a.store.uri}", f"B  {comparison.b.store.uri}"])
    print_table(console, settings_table(comparison))
    title = f"Difference, {numbers.groups[0].title}"
    print_table(console, replace(numbers, title=title, groups=numbers.groups[:1]), intervals=True)
    other = counts["same_name_other_bytes"]
    left_out = f", {other} with the same name but other bytes (left out)" if other else ""
    text = f"{counts['pairs']} images in both runs, {counts['only_in_a']} in A only, {counts['only_in_b']} in B only"
    print_lines(console, [text + left_out, *(f"note: {note}" for note in comparison.notes)])


def render(comparison: Comparison, measure: ComparedMetric, groups: list[Examples], unreadable: int) -> str:
    """The page as HTML."""
    values = {
        "title": f"{' and '.join(comparison.names)} · diffva comparison",
        "names": comparison.names,
        "runs": [
            (letter, name, run.store.uri, settings_line(run), run.recipe.name, run.recipe.generate.map_name)
            for letter, name, run in zip("AB", comparison.names, (comparison.a, comparison.b))
        ],
        "counts": comparison.counts,
        "notes": comparison.notes,
        "settings": settings_table(comparison),
        "cards": cards(comparison),
        "table": difference_table(comparison),
        "measure": measure.title,
        "scatter": SCATTER,
        "groups": groups,
        "unreadable": unreadable,
    }
    return render_page("comparison.html", ("page.css", "comparison.css"), values)
