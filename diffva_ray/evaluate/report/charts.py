"""Distributions of a run as drawings of the page itself: sharp at any size, and in its own colours, light and dark.

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

BINS, CLASSES, COLOURS = 40, 8, 6  # bins of a histogram; classes shown at most; colours there are
LEFT, WIDTH, ROW, HILL, TOP = 126.0, 194.0, 46.0, 34.0, 8.0  # of a chart, in its own units


@dataclass(frozen=True)
class Hill:
    """A histogram as one closed path; ``kind`` names its colour."""

    path: str
    kind: str


@dataclass(frozen=True)
class Line:
    """One class: its name at ``y``, its hills, and where its median and middle half lie."""

    name: str
    n: str
    y: float
    hills: list[Hill]
    median: float
    low: float
    high: float
    value: str


@dataclass(frozen=True)
class Chart:
    """``said`` is the chart in words; ``ticks`` are (x, text)."""

    key: str
    title: str
    said: str
    caption: str
    left: float
    right: float
    width: float
    height: float
    lines: list[Line]
    ticks: list[tuple[float, str]]
    middle: float | None = None


def charts(records: pd.DataFrame) -> list[Chart]:
    """SSIM, map energy and, where there is a judge, its probability of healthy before and after, of all ``ok`` records
    by class."""
    ok = finished(records)
    sizes = ok["label"].value_counts().sort_index()
    labels = sorted(sizes.nlargest(CLASSES).index)
    left_out = f" The {CLASSES} largest of {len(sizes)} classes." if len(sizes) > CLASSES else ""
    made = [
        _chart(
            ok,
            labels,
            "ssim",
            "SSIM, image and counterfactual",
            "How alike image and counterfactual are; 1 is no change." + left_out,
            3,
        ),
        _chart(ok, labels, "attribution_energy", "Map energy", "Mean of |M|: how much the maps say." + left_out, 4),
    ]
    judged = ok.dropna(subset=["judge_image", "judge_counterfactual"])
    if len(judged):
        caption = (
            "Probability of healthy, by a classifier that never guides. Grey: images; colour: their counterfactuals."
            + left_out
        )
        made.append(_chart(judged, labels, "judge_counterfactual", "Judge’s verdict", caption, 2, "judge_image"))
    return [chart for chart in made if chart is not None]


def _chart(
    rows: pd.DataFrame, labels: Sequence[str], key: str, title: str, caption: str, digits: int, beside: str = ""
) -> Chart | None:
    values = {label: _finite(rows.loc[rows["label"] == label, key]) for label in labels}
    values = {label: found for label, found in values.items() if len(found)}
    if not values:
        return None
    everything = np.concatenate(list(values.values()))
    low, high = (0.0, 1.0) if beside else _range(everything, from_zero=key == "attribution_energy")
    edges = np.linspace(low, high, BINS + 1)
    lines, said = [], []
    for n, (label, found) in enumerate(values.items()):
        base = TOP + n * ROW + HILL
        hills = [Hill(_hill(found, edges, base), f"c{labels.index(label) % COLOURS}")]
        if beside:
            hills.insert(0, Hill(_hill(_finite(rows.loc[rows["label"] == label, beside]), edges, base), "before"))
        lower, middle, upper = np.quantile(found, [0.25, 0.5, 0.75])
        said.append(f"{plain(label)} median {number(middle, digits)}")
        median, first, last = (round(_place(value, low, high), 1) for value in (middle, lower, upper))
        lines.append(Line(plain(label), count(len(found)), base, hills, median, first, last, number(middle, digits)))
    ticks = [(_place(value, low, high), number(value, 2)) for value in _ticks(low, high)]
    height = TOP + len(lines) * ROW + 14
    middle_line = _place(0.5, 0, 1) if beside else None
    return Chart(
        key,
        title,
        f"{title}: {', '.join(said)}",
        caption,
        LEFT,
        LEFT + WIDTH,
        LEFT + WIDTH + 12,
        height,
        lines,
        ticks,
        middle_line,
    )  # fmt: skip


def _finite(values: pd.Series) -> NDArray[np.float64]:
    found = values.to_numpy(float)
    return found[np.isfinite(found)]


def _range(values: NDArray[np.float64], from_zero: bool) -> tuple[float, float]:
    """From the lowest to the highest value, without the longest tenth of a percent of a tail."""
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


def _place(value: float, low: float, high: float) -> float:
    return LEFT + WIDTH * min(max((value - low) / (high - low), 0.0), 1.0)


def _hill(values: NDArray[np.float64], edges: NDArray[np.float64], base: float) -> str:
    heights, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    if not len(values):
        return ""
    # its own highest bin: the shape is what is read; how many images there are stands beside it
    tops = base - HILL * np.sqrt(heights / max(heights.max(), 1))
    step = WIDTH / BINS
    path = [f"M{LEFT:g} {base:g}"]
    for n, top in enumerate(tops):
        path.append(f"V{top:.1f}H{LEFT + (n + 1) * step:.1f}")
    return "".join([*path, f"V{base:g}Z"])
