"""Colours and drawing functions that all figures share: overlays, signed maps, sheets of panels, strips of points.

Uses matplotlib's objects and never pyplot, whose global state belongs to the user's program.
"""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from diffva_ray.evaluate.marks import NO_MARKS, Marks
from diffva_ray.schema import Image, Mask

RED = (0.90, 0.05, 0.08)  # of the paper's overlay
BRIGHTER, DARKER = "#f25a1a", "#409eff"  # the image against its counterfactual; bright enough for the dark of a lung
DIVERGING = "RdBu_r"  # distinguishable with all common colour blindness; white is no change
OUTLINE = "#00a6d6"
INK, MUTED, RULE = "#1c2328", "#5d6a73", "#c9d1d6"
CLASS_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito
MIN_LIMIT = 0.1  # |M| at full colour, at least: a map of small changes must look faint
MIN_THRESHOLD = 0.05  # of the red overlay where none was fixed; a quantile would mark pixels of healthy images, too
FORMATS = {"png": "Software", "pdf": "CreationDate", "svg": "Date"}  # with the entry that would change every time
MAX_POINTS = 300  # points of a strip
GAP, LEFT, LINE = 0.045, 1.5, 0.135  # inches: between panels, for a row's text, a line of the foot


def overlay(image: Image, signed_map: Image, threshold: float, region: NDArray[np.bool_] | None = None) -> Image:
    """The paper's red overlay as float32 [H, W, 3] in [0, 1]: ``image`` [H, W] in [0, 1], red exactly where
    ``signed_map`` > ``threshold`` (inside ``region``), more opaque for larger values.

    ``signed_map`` is M where a finding is removed and -M where one is induced.
    """
    return _tinted(np.repeat(image[..., None], 3, axis=2), signed_map, threshold, region, RED)


def changes(image: Image, signed_map: Image, threshold: float, region: NDArray[np.bool_] | None = None) -> Image:
    """An overlay in two colours, float32 [H, W, 3]: BRIGHTER where M > ``threshold``, which the counterfactual takes
    away, and DARKER where -M > ``threshold``, which it puts in."""
    shown = _tinted(np.repeat(image[..., None], 3, axis=2), signed_map, threshold, region, to_rgb(BRIGHTER))
    return _tinted(shown, -signed_map, threshold, region, to_rgb(DARKER))


def _tinted(
    pixels: Image, values: Image, threshold: float, region: NDArray[np.bool_] | None, colour: tuple[float, ...]
) -> Image:
    above = values > threshold
    if region is not None:
        above &= region
    excess = np.clip((values - threshold) / max(2 * abs(threshold), 1e-3), 0, 1)
    alpha = np.where(above, 0.45 + 0.4 * excess, 0)[..., None]
    tinted: Image = np.clip((1 - alpha) * pixels + alpha * np.asarray(colour, np.float32), 0, 1).astype(np.float32)
    return tinted


def diverging(signed_map: Image, limit: float) -> Image:
    """Colour a signed map [H, W] as float32 [H, W, 3]: blue at -``limit``, white at zero, red at ``limit``."""
    levels = np.clip(signed_map / limit, -1, 1) / 2 + 0.5
    rgba: NDArray[np.float64] = matplotlib.colormaps[DIVERGING](levels)
    return rgba[..., :3].astype(np.float32)


@dataclass(frozen=True)
class Scale:
    """How the maps of one run are coloured."""

    threshold: float  # |M| from which the overlay is coloured
    threshold_from: str  # what the threshold was fixed on, for the caption
    limit: float  # signed colours go from -limit to limit


def colour_limit(values: Image) -> float:
    """The value at which signed colours saturate: the 99.5 % quantile of |M|, at least MIN_LIMIT, rounded up to two
    digits."""
    limit = max(float(np.quantile(np.abs(values), 0.995)), MIN_LIMIT)
    digits = 10.0 ** (math.floor(math.log10(limit)) - 1)
    return math.ceil(limit / digits) * digits


def outline(axes: Axes, lesion: Mask | None) -> None:
    """Draw the outline of a lesion mask [H, W] over an image of the same size; nothing without a lesion."""
    if lesion is not None and lesion.any():
        axes.contour(lesion.astype(float), levels=[0.5], colors=[OUTLINE], linewidths=0.9)


@dataclass(frozen=True)
class Panel:
    """One image of a sheet."""

    pixels: NDArray[np.float32] | None  # grey [H, W] or coloured [H, W, 3], in [0, 1]; None: unknown
    lesion: Mask | None = None  # lesion mask [H, W] to outline


@dataclass(frozen=True)
class PanelRow:
    """One row of a sheet."""

    name: str  # bold, at the left; rows of different names are farther apart
    lines: Sequence[str]  # below the name
    panels: Sequence[Panel]  # one for each title of the sheet
    marks: Marks = NO_MARKS  # drawn on the first panel


def panel_sheet(
    rows: Sequence[PanelRow],
    titles: Sequence[str],
    foot: Sequence[str],
    scale: Scale | None = None,
    bar: int = 0,
    side: float = 1.12,
    heading: str = "",
) -> Figure:
    """Draw rows of panels below column ``titles`` and a ``heading``, with the paragraphs ``foot`` below.

    ``side``: of a panel, in inches. The signed colours of ``scale`` are explained below column ``bar``.
    """
    # Size in inches.
    width = LEFT + len(titles) * (side + GAP) + 0.1
    lines = [line for paragraph in foot for line in textwrap.wrap(paragraph, int(width * 21))]
    top = 0.16 + 0.14 * max(title.count("\n") + 1 for title in titles) + (0.3 if heading else 0)
    below = 0.38 + LINE * len(lines) + (0.46 if scale else 0)
    gaps = [0.0, *(GAP if row.name == before.name else 3 * GAP for before, row in itertools.pairwise(rows))]
    height = top + len(rows) * side + sum(gaps) + below
    figure = Figure(figsize=(width, height), facecolor="white")

    def write(y: float, text: str, size: float, colour: str, **more: Any) -> None:
        figure.text(0.1 / width, y / height, text, fontsize=size, color=colour, linespacing=1.45, parse_math=False,
                    **more)  # fmt: skip

    # Rows of panels, with their text at the left.
    write(height - 0.2, heading, 10, INK, weight="bold", va="center")
    bottom = height - top
    for row, gap in zip(rows, gaps):
        bottom -= gap + side
        name = textwrap.wrap(row.name, 18, max_lines=4, placeholder="…")
        write(bottom + side, "\n".join(name), 8, INK, weight="bold", va="top")
        write(bottom + side - 0.06 - 0.155 * len(name), "\n".join(row.lines), 6.8, MUTED, va="top")
        for column, panel in enumerate(row.panels):
            left = LEFT + column * (side + GAP)
            axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
            axes.set_axis_off()
            if row is rows[0]:
                axes.set_title(titles[column], fontsize=8, color=INK, pad=4, parse_math=False)
            if panel.pixels is None:
                axes.text(0.5, 0.5, "unknown", fontsize=6.5, color=MUTED, ha="center", va="center")
                continue
            axes.imshow(panel.pixels, cmap="gray", vmin=0, vmax=1, interpolation="bicubic")
            outline(axes, panel.lesion)
            if column == 0:
                _mark(axes, row.marks)
    # Colour bar and foot.
    if scale:
        _colour_bar(figure, scale.limit, (LEFT + bar * (side + GAP), bottom - 0.13, side))
    write(0.1 + 1.4 * LINE, "\n".join(lines), 6.5, MUTED, va="bottom")
    write(0.1, "Not for clinical use.", 6.5, INK, va="bottom", weight="bold")
    return figure


def _mark(axes: Axes, marks: Marks) -> None:
    """Draw patient sides, view and scale bar inside the image of ``axes``."""
    drawn: dict[str, Any] = {"color": "white", "transform": axes.transAxes}
    drawn["path_effects"] = [withStroke(linewidth=1.6, foreground="black")]  # legible on white and on black
    text: dict[str, Any] = {"fontsize": 6.5, "parse_math": False, **drawn}
    if marks.sides:
        axes.text(0.03, 0.5, "R", ha="left", va="center", weight="bold", **text)
        axes.text(0.97, 0.5, "L", ha="right", va="center", weight="bold", **text)
    axes.text(0.03, 0.03, short(marks.view, 16), va="bottom", **text)
    if marks.bar is not None:
        ends = [0.97 - marks.bar, 0.97]
        line: dict[str, Any] = {"linewidth": 1.4, "solid_capstyle": "butt", "scalex": False, "scaley": False}
        axes.plot(ends, [0.05, 0.05], **line, **drawn)
        axes.text(0.97, 0.07, "5 cm", ha="right", va="bottom", **text)


def _colour_bar(figure: Figure, limit: float, place: tuple[float, float, float]) -> None:
    """Explain the signed colours at ``place``: left, bottom and width in inches."""
    (left, bottom, side), (width, height) = place, figure.get_size_inches()
    axes = figure.add_axes((left / width, bottom / height, side / width, 0.055 / height))
    axes.imshow(np.linspace(-1, 1, 256)[None], cmap=DIVERGING, aspect="auto", extent=(-limit, limit, 0, 1))
    axes.set_yticks([])
    axes.set_xticks([-limit, 0, limit], [f"−{limit:.2g}", "0", f"{limit:.2g}"])
    axes.set_xlabel("M, share of the grey range", fontsize=6, color=MUTED, labelpad=1)
    axes.tick_params(labelsize=6.5, colors=MUTED, length=2, pad=1.5, width=0.5)
    for spine in axes.spines.values():
        spine.set(linewidth=0.4, color=RULE)


def strip(
    axes: Axes, place: float, values: NDArray[np.float64], colour: str, spread: float, across: bool = False
) -> None:
    """Draw finite values as points around ``place``, with a bar for the middle half and a line for the median.

    Values are on the y axis, with ``across`` on the x axis. At most MAX_POINTS points are drawn."""
    numbers = np.sort(values[np.isfinite(values)])
    if not len(numbers):
        return
    low, middle, high = np.quantile(numbers, [0.25, 0.5, 0.75])
    drawn = numbers[np.linspace(0, len(numbers) - 1, min(len(numbers), MAX_POINTS)).round().astype(int)]
    golden = (np.arange(len(drawn)) * 0.6180339887) % 1  # evenly scattered and reproducible
    turn = -1 if across else 1
    x, y = (place + spread * (2 * golden - 1), drawn)[::turn]
    axes.scatter(x, y, s=7, color=colour, alpha=0.45, linewidths=0)
    axes.plot(*([place, place], [low, high])[::turn], color=INK, linewidth=2.4, solid_capstyle="butt")
    axes.plot(*([place - 0.8 * spread, place + 0.8 * spread], [middle, middle])[::turn], color=INK, linewidth=1.4)


def style(axes: Axes, title: str, grid: Literal["both", "x", "y"] = "both") -> None:
    """Give axes of points their title, grid and colours."""
    axes.set_title(title, fontsize=8.5, color=INK, loc="left", pad=14, weight="bold")
    axes.tick_params(labelsize=7, colors=MUTED, length=0)
    axes.grid(axis=grid, color="#e6eaed", linewidth=0.7)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set(color=RULE, linewidth=0.8)


def short(text: str, length: int) -> str:
    """Shorten ``text`` to one line of at most ``length`` characters, with an ellipsis."""
    line = " ".join(str(text).replace("_", " ").split())
    return line if len(line) <= length else line[: length - 1] + "…"


def render(figure: Figure, kind: str) -> bytes:
    """Render the figure as one of FORMATS, with pixels of 200 dpi; the bytes are reproducible."""
    sink = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "diffva"}):
        figure.savefig(sink, format=kind, dpi=200, metadata={FORMATS[kind]: None})
    return sink.getvalue()


def png(figure: Figure) -> bytes:
    """Render the figure as a PNG."""
    return render(figure, "png")
