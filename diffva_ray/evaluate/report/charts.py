"""Distributions of a run as SVG charts of the page, in its own colours, light and dark.

Coordinates are computed here; the template only writes them down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from diffva_ray.evaluate.records import finished
from diffva_ray.evaluate.report.numbers import count, number, plain

BINS = 40  # of a histogram
MAX_CLASSES, COLOURS = 8, 6  # classes in a chart; colours in the style sheet
LEFT, WIDTH, ROW, HILL, TOP = 126.0, 194.0, 46.0, 34.0, 8.0  # SVG units


@dataclass(frozen=True)
class Hill:
    """A histogram as one closed path."""

    path: str
    kind: str  # CSS class, which sets its colour


@dataclass(frozen=True)
class Line:
    """One class of a chart."""

    name: str
    n: str  # number of records
    y: float  # of its base line
    hills: list[Hill]
    median: float  # x, as are the quartiles
    low: float
    high: float
    value: str  # the median as text


@dataclass(frozen=True)
class Chart:
    """One chart; all coordinates are in SVG units."""

    key: str
    title: str
    description: str  # the chart in words
    caption: str
    height: float
    lines: list[Line]
    ticks: list[tuple[float, str]]  # (x, text)
    middle: float | None = None  # x of the line at a probability of one half
    left: float = LEFT
    right: float = LEFT + WIDTH
    width: float = LEFT + WIDTH + 12


def charts(records: pd.DataFrame) -> list[Chart]:
    """SSIM, map energy and, with a judge, its probability of healthy, of all ``ok`` records by class."""
    ok = finished(records)
    sizes = ok["label"].value_counts().sort_index()
    labels = sorted(sizes.nlargest(MAX_CLASSES).index)
    left_out = f" The {MAX_CLASSES} largest of {len(sizes)} classes." if len(sizes) > MAX_CLASSES else ""
    judged = ok.dropna(subset=["judge_image", "judge_counterfactual"])
    results = [
        _chart(ok, labels, "ssim", "SSIM of image and counterfactual", f"Similarity; 1 is no change.{left_out}", 3),
        _chart(ok, labels, "attribution_energy", "Map energy",
               f"Mean of |M|: the total strength of the attribution map.{left_out}", 4),
        _chart(judged, labels, "judge_counterfactual", "Probability of healthy",
               "By the judge, a classifier that never guides a counterfactual. Grey: images; colour: their "
               f"counterfactuals.{left_out}", 2, "judge_image"),
    ]  # fmt: skip
    return [chart for chart in results if chart is not None]


def _chart(
    rows: pd.DataFrame, labels: Sequence[str], key: str, title: str, caption: str, digits: int, beside: str = ""
) -> Chart | None:
    """One chart of column ``key``; the values of column ``beside``, probabilities too, are drawn grey behind it."""
    values = {label: _finite(rows.loc[rows["label"] == label, key]) for label in labels}
    values = {label: of_label for label, of_label in values.items() if len(of_label)}
    if not values:
        return None
    everything = np.concatenate(list(values.values()))
    low, high = (0.0, 1.0) if beside else _range(everything, from_zero=key == "attribution_energy")
    edges = np.linspace(low, high, BINS + 1)
    lines, medians = [], []
    for n, (label, of_label) in enumerate(values.items()):
        base = TOP + n * ROW + HILL
        hills = [Hill(_hill(of_label, edges, base), f"c{labels.index(label) % COLOURS}")]
        if beside:
            hills.insert(0, Hill(_hill(_finite(rows.loc[rows["label"] == label, beside]), edges, base), "before"))
        lower, middle, upper = np.quantile(of_label, [0.25, 0.5, 0.75])
        medians.append(f"{plain(label)} median {number(middle, digits)}")
        median, first, last = (round(_x(value, low, high), 1) for value in (middle, lower, upper))
        lines.append(Line(plain(label), count(len(of_label)), base, hills, median, first, last, number(middle, digits)))
    places = _ticks(low, high)
    exact = (n for n in range(2, 9) if all(abs(value - round(value, n)) < 1e-9 for value in places))
    decimals = next(exact, 9)
    ticks = [(_x(value, low, high), number(value, decimals)) for value in places]
    description = f"{title}: {', '.join(medians)}"
    half = _x(0.5, 0, 1) if beside else None
    return Chart(key, title, description, caption, TOP + len(lines) * ROW + 14, lines, ticks, half)


def _finite(values: pd.Series) -> NDArray[np.float64]:
    array: NDArray[np.float64] = values.to_numpy(float)
    return array[np.isfinite(array)]


def _range(values: NDArray[np.float64], from_zero: bool) -> tuple[float, float]:
    """From the lowest to the highest value, without 0.1 % of the values at either end."""
    low, high = np.quantile(values, [0.001, 0.999])
    low = 0.0 if from_zero else float(low)
    return low, max(float(high), low + 1e-3)


def _ticks(low: float, high: float) -> list[float]:
    """Three or four round values between the ends."""
    raw = (high - low) / 3
    power = 10.0 ** np.floor(np.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw)
    first = np.ceil(low / step - 1e-9)
    return [float(n * step) + 0.0 for n in np.arange(first, np.floor(high / step + 1e-9) + 1)]


def _x(value: float, low: float, high: float) -> float:
    return LEFT + WIDTH * min(max((value - low) / (high - low), 0.0), 1.0)


def _hill(values: NDArray[np.float64], edges: NDArray[np.float64], base: float) -> str:
    heights, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    if not len(values):
        return ""
    # scaled to its own highest bin: the chart compares shapes, and the number of records is written beside it
    tops = base - HILL * np.sqrt(heights / max(heights.max(), 1))
    step = WIDTH / BINS
    path = [f"M{LEFT:g} {base:g}"]
    for n, top in enumerate(tops):
        path.append(f"V{top:.1f}H{LEFT + (n + 1) * step:.1f}")
    return "".join([*path, f"V{base:g}Z"])
