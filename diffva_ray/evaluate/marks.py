"""Patient sides, view and scale bar of an image, where its data set or header tells them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

BAR = 50.0  # mm
WIDTHS = (220.0, 600.0)  # mm; another width means that the spacing is of another grid, as that of NIH ChestX-ray14 is
FRONTAL = re.compile(r"(PA|AP|FRONTAL|ANTEROPOSTERIOR|POSTEROANTERIOR)(?![A-Z])")
SIDES = "R, L: the patient's sides, as frontal views are displayed"
SCALE = "bar: 5 cm from left to right, by the image's pixel spacing"


@dataclass(frozen=True)
class Marks:
    """What is drawn on an image for orientation."""

    view: str = ""  # PA, AP, LATERAL ...; empty where unknown
    bar: float | None = None  # length of BAR as a share of the image's width; None where the spacing is unknown

    @property
    def sides(self) -> bool:
        """Whether the left of the image is the patient's right."""
        return FRONTAL.match(self.view) is not None


NO_MARKS = Marks()


def legend_of(drawn: Iterable[Marks]) -> list[str]:
    """What the drawn marks mean, for a caption."""
    drawn = list(drawn)
    sides, bars = any(mark.sides for mark in drawn), any(mark.bar is not None for mark in drawn)
    return [SIDES] * sides + [SCALE] * bars


def marks(view: str | None, spacing: str | None, width: float | None) -> Marks:
    """The marks of an image of ``width`` pixels, from its columns ``view`` and ``spacing`` (mm, row and column)."""
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:[eE]-?\d+)?", spacing or "")]
    across = numbers[-1] * width if len(numbers) in (1, 2) and width else 0.0
    return Marks((view or "").upper(), BAR / across if WIDTHS[0] <= across <= WIDTHS[1] else None)
