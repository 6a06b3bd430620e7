"""Sides, view and scale bar are drawn only where they are known."""

from __future__ import annotations

import pytest

from diffva_ray.evaluate.marks import NO_MARKS, SCALE, SIDES, legend_of, marks


@pytest.mark.parametrize(
    ("view", "sides"),
    [("PA", True), ("ap", True), ("AP_horizontal", True), ("FRONTAL", True), ("AP SUPINE", True),
     ("LATERAL", False), ("", False), (None, False), ("PATIENT", False), ("LL", False), ("APICAL", False)],
)  # fmt: skip
def test_sides_are_known_of_frontal_views_only(view: str | None, sides: bool) -> None:
    assert marks(view, "", 100).sides == sides


@pytest.mark.parametrize(
    ("spacing", "width", "bar"),
    [
        ("0.143/0.143", 2500, 50 / 357.5),
        ("0.2/0.125", 2800, 50 / 350),  # row and column
        ("[0.143, 0.143]", 2500, 50 / 357.5),
        ("1.43e-1", 2500, 50 / 357.5),
        ("0.143/0.143", 1024, None),  # of the original, as in NIH ChestX-ray14: a chest is not 15 cm wide
        ("143/143", 2500, None),  # not millimetres
        ("", 2500, None),
        (None, 2500, None),
        ("unknown", 2500, None),
        ("0.1/0.1/0.1", 3500, None),
        ("0.143", None, None),
    ],
)
def test_a_scale_bar_needs_a_spacing_that_fits_a_chest(
    spacing: str | None, width: float | None, bar: float | None
) -> None:
    assert marks("", spacing, width).bar == (bar if bar is None else pytest.approx(bar))


def test_the_caption_explains_what_is_drawn() -> None:
    assert legend_of([]) == legend_of([NO_MARKS]) == legend_of([marks("LATERAL", "", 1)]) == []
    assert legend_of([NO_MARKS, marks("PA", "0.143", 2500)]) == [SIDES, SCALE]
