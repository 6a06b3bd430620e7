"""Lesions of phantoms by class, and distractors that occur in every class.

A lesion changes the densities of a patient, or the coordinates at which they are computed. The image of the same
patient without the lesion is the exact ground-truth counterfactual. Coordinates are those of ``thorax``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from scipy import ndimage

from diffva_ray.data.thorax import Array, edge, ellipse, lattice_noise


class Anatomy(Protocol):
    """Anatomy that a lesion is placed in: a synthetic ``Thorax``, or the lungs of a real image."""

    def lung(self, u: Array, v: Array, side: int) -> Array:
        """Signed distance to the border of one lung (side -1: image left), positive inside."""

    def heart(self, u: Array, v: Array) -> Array:
        """Signed distance to the border of the heart, positive inside."""


@dataclass
class Lesion:
    """Change that a lesion makes; arrays [size, size]."""

    opacity: Array  # in [0, 1]; weight of the mean with ``towards``
    towards: Array  # density of the lesion
    push: tuple[Array, Array] | None = None  # displacement (u, v) of the anatomy's coordinates
    heart_scale: float = 1.0  # enlargement of the heart
    extra: Array | None = None  # added density (reticulation, a pleural line)
    factors: dict[str, object] = field(default_factory=dict)  # parameters for the set's JSON, such as side and severity


def _point_in_lung(rng: np.random.Generator, thorax: Anatomy, side: int, peripheral: bool) -> tuple[float, float]:
    """A point of one lung in patient coordinates, by rejection sampling; ``peripheral``: near the chest wall."""
    for _ in range(200):
        u, v = side * rng.uniform(0.2, 0.72), rng.uniform(-0.6, 0.42)
        inside = float(thorax.lung(np.array(u), np.array(v), side))
        heart = float(thorax.heart(np.array(u), np.array(v)))
        if heart < -0.03 and (0.035 < inside < 0.10 if peripheral else inside > 0.09):
            return u, v
    return side * 0.45, -0.1


def blob(rng: np.random.Generator, u: Array, v: Array, at: tuple[float, float], radius: float, soft: float) -> Array:
    """A soft ellipse with an irregular border, [size, size] in [0, 1]."""
    aspect, angle = rng.uniform(0.72, 1.35), rng.uniform(0, np.pi)
    phase = rng.uniform(0, 2 * np.pi, 3)
    direction = np.arctan2(v - at[1], u - at[0])
    wobble = 1 + sum(0.13 / (k + 1) * np.sin((k + 2) * direction + phase[k]) for k in range(3))
    distance = ellipse(u, v, at, (radius * aspect, radius / aspect), angle) + radius * 0.5 * (wobble - 1)
    return edge(distance, soft * radius)


def side_name(side: int) -> str:
    """The patient's side: image left (-1) is the patient's right."""
    return "right" if side < 0 else "left"


def _severity(
    rng: np.random.Generator, minimum: float, maximum: float, key: str = "severity"
) -> tuple[float, dict[str, object]]:
    """A severity sampled between two values, and its factors: the number as ``key``, and a grade by its third."""
    severity = rng.uniform(minimum, maximum)
    third = int(3 * (severity - minimum) / (maximum - minimum))
    return severity, {key: round(severity, 3), "grade": ("mild", "moderate", "severe")[third]}


def lung_opacity(rng: np.random.Generator, thorax: Anatomy, u: Array, v: Array) -> Lesion:
    """One or two soft consolidations in one or two lungs."""
    opacity = np.zeros_like(u)
    severity, factors = _severity(rng, 0.52, 0.78)
    sides = []
    for _ in range(1 + (rng.random() < 0.35)):
        side = -1 if rng.random() < 0.5 else 1
        sides.append(side_name(side))
        at = _point_in_lung(rng, thorax, side, peripheral=False)
        opacity = np.maximum(opacity, severity * blob(rng, u, v, at, rng.uniform(0.11, 0.16), 0.45))
    return Lesion(opacity, tissue(u), factors={"sides": sorted(set(sides)), **factors})


def covid(rng: np.random.Generator, thorax: Anatomy, u: Array, v: Array) -> Lesion:
    """Bilateral and peripheral opacities: two to four small patches near each chest wall."""
    opacity = np.zeros_like(u)
    severity, factors = _severity(rng, 0.48, 0.70)
    for side in (-1, 1):
        for _ in range(int(rng.integers(2, 5))):
            at = _point_in_lung(rng, thorax, side, peripheral=True)
            opacity = np.maximum(opacity, severity * blob(rng, u, v, at, rng.uniform(0.068, 0.102), 0.45))
    return Lesion(opacity, tissue(u), factors={"sides": ["left", "right"], **factors})


def viral_pneumonia(rng: np.random.Generator, thorax: Anatomy, u: Array, v: Array) -> Lesion:
    """Diffuse reticular opacity: haze with a mesh over a large part of both lungs."""
    severity, factors = _severity(rng, 0.85, 1.25)
    lesion = reticular(rng, severity, u, v)
    lesion.factors = {"sides": ["left", "right"], **factors}
    return lesion


def reticular(rng: np.random.Generator, severity: float, u: Array, v: Array) -> Lesion:
    """Haze with a mesh over an ellipse in each lung; ``severity`` about 1."""
    # the mesh: threads along the zeros of two noise fields
    size = u.shape[0]
    coarse, fine = lattice_noise(rng, 16, size), lattice_noise(rng, 11, size)
    mesh = np.clip(1.0 - 1.5 * np.abs(coarse), 0, 1) + 0.6 * np.clip(1.0 - 1.5 * np.abs(fine), 0, 1)
    # the zone: an ellipse in each lung
    envelope = np.zeros_like(u)
    for side in (-1, 1):
        centre = (side * rng.uniform(0.34, 0.46), rng.uniform(-0.12, 0.22))
        radii = (rng.uniform(0.27, 0.36), rng.uniform(0.42, 0.56))
        envelope = np.maximum(envelope, edge(ellipse(u, v, centre, radii, 0.0), 0.13))
    return Lesion(
        0.25 * severity * envelope,
        tissue(u),
        extra=severity * envelope * 0.075 * (mesh - 0.35),
    )


def cardiomegaly(rng: np.random.Generator, thorax: Anatomy, u: Array, v: Array) -> Lesion:
    """An enlarged heart; the ground-truth counterfactual has the patient's normal heart."""
    scale, factors = _severity(rng, 1.28, 1.5, "heart_scale")
    return Lesion(np.zeros_like(u), tissue(u), heart_scale=scale, factors=factors)


def pneumothorax(rng: np.random.Generator, thorax: Anatomy, u: Array, v: Array) -> Lesion:
    """Air beside a collapsed lung: a dark crescent without vessels, and the pleural line. Not used in training."""
    side = -1 if rng.random() < 0.5 else 1
    depth, factors = _severity(rng, 0.10, 0.19, "depth")
    lesion = crescent(thorax, side, depth, u, v)
    lesion.factors = {"sides": [side_name(side)], **factors}
    return lesion


def crescent(thorax: Anatomy, side: int, depth: float, u: Array, v: Array) -> Lesion:
    """Air of ``depth`` between a lung and the chest wall, and the pleural line."""
    inside = thorax.lung(u, v, side)
    lateral = edge(side * u - 0.33, 0.04) * edge(0.20 - v, 0.10)
    air = edge(inside, 0.02) * edge(depth - inside, 0.02) * lateral
    line = np.exp(-(((inside - depth) / 0.016) ** 2)) * lateral
    return Lesion(0.85 * air, np.full_like(u, 0.08), extra=0.07 * line)


def mass_effect(rng: np.random.Generator, thorax: Anatomy, u: Array, v: Array) -> Lesion:
    """A dense mass that displaces heart and vessels; the ground-truth counterfactual shows them undisplaced."""
    side = -1 if rng.random() < 0.5 else 1
    at = _point_in_lung(rng, thorax, side, peripheral=False)
    radius, factors = _severity(rng, 0.16, 0.22, "radius")
    lesion = displacing(rng, at, radius, u, v)
    lesion.factors = {"sides": [side_name(side)], **factors}
    return lesion


def displacing(rng: np.random.Generator, at: tuple[float, float], radius: float, u: Array, v: Array) -> Lesion:
    """A dense mass at a point, which pushes the anatomy around it away."""
    opacity = 0.8 * blob(rng, u, v, at, radius, 0.22)
    du, dv = u - at[0], v - at[1]
    distance = np.hypot(du, dv) + 1e-6
    displacement = 0.5 * radius * np.exp(-((distance / (2.6 * radius)) ** 2)) * np.tanh(distance / (0.8 * radius))
    return Lesion(opacity, tissue(u), push=(-du / distance * displacement, -dv / distance * displacement))


def tissue(u: Array) -> Array:
    return np.full_like(u, 0.62)


LESIONS: dict[str, Callable[[np.random.Generator, Anatomy, Array, Array], Lesion]] = {
    "Lung_Opacity": lung_opacity,
    "COVID": covid,
    "Viral Pneumonia": viral_pneumonia,
    "Cardiomegaly": cardiomegaly,
    "Pneumothorax": pneumothorax,
    "Mass": mass_effect,
}

# 5 x 5 stencils of side markers
_LETTERS = {"R": "11110 10010 11110 10100 10010", "L": "10000 10000 10000 10000 11110"}


def distractors(rng: np.random.Generator, u: Array, v: Array) -> Array:
    """Density [H, W] of objects that any image may show: a side marker, wires, an electrode, a pacemaker."""
    shade = np.zeros_like(u)
    # side marker
    if rng.random() < 0.6:
        letter = "R" if rng.random() < 0.5 else "L"
        stencil = np.array([[int(c) for c in row] for row in _LETTERS[letter].split()], dtype=float)
        corner = (-0.80 if letter == "R" else 0.80) + rng.uniform(-0.05, 0.05), rng.uniform(-0.86, -0.70)
        step = rng.uniform(0.035, 0.045)
        rows, columns = (v - corner[1]) / step + 2.0, (u - corner[0]) / step + 2.0
        shade += 0.45 * np.clip(ndimage.map_coordinates(stencil, [rows, columns], order=1, cval=0.0), 0, 1)
    # wires
    for _ in range(int(rng.random() < 0.25) + int(rng.random() < 0.10)):
        start, slope, bend = rng.uniform(-0.7, 0.7), rng.uniform(-0.6, 0.6), rng.uniform(-0.5, 0.5)
        wire = u - (start + slope * v + bend * v**2)
        shade += 0.16 * np.exp(-((wire / 0.016) ** 2))
    # electrode
    if rng.random() < 0.15:
        at = (rng.uniform(-0.6, 0.6), rng.uniform(-0.45, 0.5))
        shade += 0.22 * edge(ellipse(u, v, at, (0.045, 0.045), 0.0), 0.012)
    # pacemaker with its lead
    if rng.random() < 0.08:
        at = (rng.uniform(0.45, 0.6), rng.uniform(-0.62, -0.5))
        shade += 0.35 * edge(ellipse(u, v, at, (0.12, 0.085), rng.uniform(-0.4, 0.4)), 0.012)
        lead = np.abs((v - at[1]) - 1.5 * (at[0] - u)) / 1.8
        shade += 0.16 * np.exp(-((lead / 0.014) ** 2)) * edge(at[0] - u, 0.02) * edge(u - 0.1, 0.02)
    return shade
