"""Draw the phantoms with factors of docs/phantoms.md: one patient, one factor changed per panel.

python docs/draw_factors.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from diffva_ray.data.factor_phantoms import factor_phantom
from diffva_ray.data.factors import Factors, Finding
from diffva_ray.data.places import SIDES, ZONES
from diffva_ray.evaluate.drawing import INK, png

PATIENT, SEED, SIZE = 9, 1, 128
OPACITY = Finding("Lung_Opacity", "left", "middle", size=0.5, severity=0.7)
MASS = Finding("Mass", "left", "middle", size=0.5)
BASE = Factors(50, "M", "PA")


def with_finding(*findings: Finding) -> Factors:
    return replace(BASE, findings=findings)


ROWS: list[list[tuple[str, Factors]]] = [
    [
        *((f"age {age}", replace(BASE, age=age)) for age in (20, 50, 90)),
        ("female", replace(BASE, sex="F")),
        ("AP", replace(BASE, view="AP")),
        ("female, 80, AP", Factors(80, "F", "AP")),
    ],
    [(f"mass, {side}, {zone}", with_finding(replace(MASS, side=side, zone=zone))) for side in SIDES for zone in ZONES],
    [
        *((f"opacity, size {size:g}", with_finding(replace(OPACITY, size=size))) for size in (0.0, 0.5, 1.0)),
        *((f"opacity, severity {s:g}", with_finding(replace(OPACITY, severity=s))) for s in (0.0, 0.5, 1.0)),
    ],
    [
        *(
            (f"pneumothorax, {side}, size {size:g}", with_finding(Finding("Pneumothorax", side, size=size)))
            for side, size in (("right", 0.2), ("left", 0.9))
        ),
        ("cardiomegaly, severity 0.8", with_finding(Finding("Cardiomegaly", severity=0.8))),
        ("COVID, severity 0.8", with_finding(Finding("COVID", "bilateral", severity=0.8))),
        ("opacity and cardiomegaly", with_finding(OPACITY, Finding("Cardiomegaly", severity=0.8))),
        ("mass and pneumothorax", with_finding(MASS, Finding("Pneumothorax", "right", size=0.7))),
    ],
]


def main() -> None:
    figure = Figure(figsize=(8.4, 6.3), facecolor="white", layout="constrained")
    for panel, (name, factors) in zip(
        figure.subplots(len(ROWS), 6).flat, [p for row in ROWS for p in row], strict=True
    ):
        panel.imshow(factor_phantom(factors, PATIENT, SEED, SIZE).image, cmap="gray", vmin=0, vmax=1)
        panel.set_title(name, fontsize=6.5, color=INK)
        panel.set_axis_off()
    (Path(__file__).parent / "images" / "phantom_factors.png").write_bytes(png(figure))


if __name__ == "__main__":
    main()
