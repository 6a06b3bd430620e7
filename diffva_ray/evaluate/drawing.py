"""Colours and drawing functions shared by all figures: the red overlay, signed maps, outlines, the colour bar.

Uses matplotlib's objects and never pyplot, whose global state belongs to the user's program.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from diffva_ray.schema import Image

RED = np.array([0.90, 0.05, 0.08], np.float32)
DIVERGING = "RdBu_r"  # distinguishable with all common colour blindness; white is no change
OUTLINE = "#00a6d6"
INK, MUTED, RULE = "#1c2328", "#5d6a73", "#c9d1d6"
CLASS_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito


def overlay(image: Image, signed_map: Image, threshold: float, region: NDArray[np.bool_] | None = None) -> Image:
    """The paper's red overlay as float32 [H, W, 3] in [0, 1]: ``image`` [H, W] in [0, 1], red exactly where
    ``signed_map`` > ``threshold`` (inside ``region``), more opaque for larger values.

    ``signed_map`` is M where a finding is removed and -M where one is induced.
    """
    above = signed_map > threshold
    if region is not None:
        above &= region
    excess = np.clip((signed_map - threshold) / max(2 * abs(threshold), 1e-3), 0, 1)
    alpha = np.where(above, 0.35 + 0.5 * excess, 0)[..., None]
    return np.clip((1 - alpha) * image[..., None] + alpha * RED, 0, 1).astype(np.float32)


def diverging(signed_map: Image, limit: float) -> Image:
    """Colour a signed map [H, W] as float32 [H, W, 3]: blue at -``limit``, white at zero, red at ``limit``."""
    levels = np.clip(signed_map / limit, -1, 1) / 2 + 0.5
    return matplotlib.colormaps[DIVERGING](levels)[..., :3].astype(np.float32)


@dataclass(frozen=True)
class Scale:
    """How the maps of one run are coloured."""

    threshold: float  # the overlay is red above it
    threshold_from: str  # what the threshold was fixed on, for the caption
    limit: float  # signed colours go from -limit to limit


def colour_limit(values: Image, minimum: float = 1e-3) -> float:
    """The value at which signed colours saturate: the 99.5 % quantile of |M|, at least ``minimum``, rounded up to two
    digits."""
    limit = max(float(np.quantile(np.abs(values), 0.995)), minimum)
    digits = 10.0 ** (math.floor(math.log10(limit)) - 1)
    return math.ceil(limit / digits) * digits


def outline(axes: Axes, lesion: NDArray[np.bool_] | None) -> None:
    """Draw the outline of a lesion mask [H, W] over an image of the same size; nothing without a lesion."""
    if lesion is not None and lesion.any():
        axes.contour(lesion.astype(float), levels=[0.5], colors=[OUTLINE], linewidths=0.9)


def colour_bar(figure: Figure, scale: Scale, left: float, bottom: float, width: float, height: float) -> None:
    """Draw the signed colours of ``scale``; ``left``, ``bottom`` and ``width`` are fractions of the figure, which is
    ``height`` inches high."""
    axes = figure.add_axes((left, bottom, width, 0.055 / height))
    ramp = np.linspace(-1, 1, 256)[None]
    axes.imshow(ramp, cmap=DIVERGING, aspect="auto", extent=(-scale.limit, scale.limit, 0, 1))
    axes.set_yticks([])
    axes.set_xticks([-scale.limit, 0, scale.limit], [f"−{scale.limit:.2g}", "0", f"{scale.limit:.2g}"])
    axes.tick_params(labelsize=6.5, colors=MUTED, length=2, pad=1.5, width=0.5)
    for spine in axes.spines.values():
        spine.set(linewidth=0.4, color=RULE)


def short(text: str, length: int) -> str:
    """Shorten ``text`` to one line of at most ``length`` characters, with an ellipsis."""
    line = " ".join(str(text).replace("_", " ").split())
    return line if len(line) <= length else line[: length - 1] + "…"


def png(figure: Figure) -> bytes:
    """Render the figure as a PNG of 200 dpi; the bytes are reproducible."""
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=200, metadata={"Software": None})
    return sink.getvalue()
