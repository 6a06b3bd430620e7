"""What makes a phantom abnormal, and what merely looks odd: lesions by class, and distractors of every class.

A lesion changes densities (or the coordinates at which they are taken) of a patient who exists without it; the image
without it is the exact ground truth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from scipy import ndimage

from diffva_ray.data.thorax import Array, edge, ellipse, lattice_noise


class Anatomy(Protocol):
    """What a lesion needs to know of a patient: a synthetic ``Thorax``, or the lungs of a real image."""

    def lung(self, u: Array, v: Array, side: int) -> Array: ...

    def heart(self, u: Array, v: Array) -> Array: ...


@dataclass
class Lesion:
    """``opacity`` in [0, 1] mixes the density towards ``towards``; ``push`` displaces the anatomy's coordinates."""

    opacity: Array
    towards: Array
    push: tuple[Array, Array] | None = None
    heart_scale: float = 1.0
    extra: Array | None = None  # density added on top (reticulation, a pleural line)
    factors: dict[str, object] = field(default_factory=dict)


def _point_in_lung(rng: np.random.Generator, thorax: Anatomy, side: int, peripheral: bool) -> tuple[float, float]:
    """A point of one lung in patient coordinates, by rejection; ``peripheral``: near the chest wall."""
    for _ in range(200):
        u, v = side * rng.uniform(0.2, 0.72), rng.uniform(-0.6, 0.42)
        inside = float(thorax.lung(np.array(u), np.array(v), side))
        away = float(thorax.heart(np.array(u), np.array(v)))
        if away < -0.03 and (0.035 < inside < 0.10 if peripheral else inside > 0.09):
            return u, v
    return side * 0.45, -0.1


def _blob(rng: np.random.Generator, u: Array, v: Array, at: tuple[float, float], radius: float, soft: float) -> Array:
    """A soft ellipse in [0, 1] with a wobbling border."""
    aspect, angle = rng.uniform(0.72, 1.35), rng.uniform(0, np.pi)
    phase = rng.uniform(0, 2 * np.pi, 3)
    around = np.arctan2(v - at[1], u - at[0])
    wobble = 1 + sum(0.13 / (k + 1) * np.sin((k + 2) * around + phase[k]) for k in range(3))
    distance = ellipse(u, v, at, (radius * aspect, radius / aspect), angle) + radius * 0.5 * (wobble - 1)
    return edge(distance, soft * radius)


def _side_name(side: int) -> str:
    return "right" if side < 0 else "left"  # the patient's side: image left is the patient's right


def _severity(rng: np.random.Generator, least: float, most: float, key: str = "severity") -> tuple[float, dict]:
    """How bad it is, drawn between two values, and the factors that tell it: the number, and its third in words."""
    severity = rng.uniform(least, most)
    third = int(3 * (severity - least) / (most - least))
    return severity, {key: round(severity, 3), "grade": ("mild", "moderate", "severe")[third]}


def lung_opacity(rng: np.random.Generator, thorax: Anatomy, u: Array, v: Array) -> Lesion:
    """One or two soft consolidations in one or two lungs."""
    opacity = np.zeros_like(u)
    severity, factors = _severity(rng, 0.52, 0.78)
    sides = []
    for _ in range(1 + (rng.random() < 0.35)):
        side = -1 if rng.random() < 0.5 else 1
        sides.append(_side_name(side))
        at = _point_in_lung(rng, thorax, side, peripheral=False)
        opacity = np.maximum(opacity, severity * _blob(rng, u, v, at, rng.uniform(0.11, 0.16), 0.45))
    return Lesion(opacity, _tissue(u), factors={"sides": sorted(set(sides)), **factors})


def covid(rng: np.random.Generator, thorax: Anatomy, u: Array, v: Array) -> Lesion:
    """Bilateral, peripheral, patchy: two to four small patches near each chest wall."""
    opacity = np.zeros_like(u)
    severity, factors = _severity(rng, 0.48, 0.70)
    for side in (-1, 1):
        for _ in range(int(rng.integers(2, 5))):
            at = _point_in_lung(rng, thorax, side, peripheral=True)
            opacity = np.maximum(opacity, severity * _blob(rng, u, v, at, rng.uniform(0.068, 0.102), 0.45))
    return Lesion(opacity, _tissue(u), factors={"sides": ["left", "right"], **factors})


def viral_pneumonia(rng: np.random.Generator, thorax: Anatomy, u: Array, v: Array) -> Lesion:
    """Diffuse and reticular: haze with a mesh, over a large part of both lungs."""
    size = u.shape[0]
    severity, factors = _severity(rng, 0.85, 1.25)
    coarse, fine = lattice_noise(rng, 16, size), lattice_noise(rng, 11, size)
    mesh = np.clip(1.0 - 1.5 * np.abs(coarse), 0, 1) + 0.6 * np.clip(1.0 - 1.5 * np.abs(fine), 0, 1)
    envelope = np.zeros_like(u)
    for side in (-1, 1):
        centre = (side * rng.uniform(0.34, 0.46), rng.uniform(-0.12, 0.22))
        radii = (rng.uniform(0.27, 0.36), rng.uniform(0.42, 0.56))
        envelope = np.maximum(envelope, edge(ellipse(u, v, centre, radii, 0.0), 0.13))
    return Lesion(
        0.25 * severity * envelope,
        _tissue(u),
        extra=severity * envelope * 0.075 * (mesh - 0.35),
        factors={"sides": ["left", "right"], **factors},
    )


def cardiomegaly(rng: np.random.Generator, thorax: Anatomy, u: Array, v: Array) -> Lesion:
    """An enlarged heart; the ground truth has the patient's own."""
    scale, factors = _severity(rng, 1.28, 1.5, "heart_scale")
    return Lesion(np.zeros_like(u), _tissue(u), heart_scale=scale, factors=factors)


def pneumothorax(rng: np.random.Generator, thorax: Anatomy, u: Array, v: Array) -> Lesion:
    """Air beside a collapsed lung: a dark, vessel-free crescent and the pleural line. Held out of training."""
    side = -1 if rng.random() < 0.5 else 1
    depth, factors = _severity(rng, 0.10, 0.19, "depth")
    inside = thorax.lung(u, v, side)
    lateral = edge(side * u - 0.33, 0.04) * edge(0.20 - v, 0.10)
    crescent = edge(inside, 0.02) * edge(depth - inside, 0.02) * lateral
    line = np.exp(-(((inside - depth) / 0.016) ** 2)) * lateral
    return Lesion(
        0.85 * crescent,
        np.full_like(u, 0.08),
        extra=0.07 * line,
        factors={"sides": [_side_name(side)], **factors},
    )


def mass_effect(rng: np.random.Generator, thorax: Anatomy, u: Array, v: Array) -> Lesion:
    """A dense mass that displaces heart and vessels; the ground truth has them in place."""
    side = -1 if rng.random() < 0.5 else 1
    at = _point_in_lung(rng, thorax, side, peripheral=False)
    radius, factors = _severity(rng, 0.16, 0.22, "radius")
    opacity = 0.8 * _blob(rng, u, v, at, radius, 0.22)
    du, dv = u - at[0], v - at[1]
    distance = np.hypot(du, dv) + 1e-6
    shove = 0.5 * radius * np.exp(-((distance / (2.6 * radius)) ** 2)) * np.tanh(distance / (0.8 * radius))
    return Lesion(
        opacity,
        _tissue(u),
        push=(-du / distance * shove, -dv / distance * shove),
        factors={"sides": [_side_name(side)], **factors},
    )


def _tissue(u: Array) -> Array:
    return np.full_like(u, 0.62)


LESIONS: dict[str, Callable[[np.random.Generator, Anatomy, Array, Array], Lesion]] = {
    "Lung_Opacity": lung_opacity,
    "COVID": covid,
    "Viral Pneumonia": viral_pneumonia,
    "Cardiomegaly": cardiomegaly,
    "Pneumothorax": pneumothorax,
    "Mass": mass_effect,
}

# 5 x 5 stencils of the side markers on a real image
_LETTERS = {"R": "11110 10010 11110 10100 10010", "L": "10000 10000 10000 10000 11110"}


def distractors(rng: np.random.Generator, u: Array, v: Array) -> Array:
    """Density [H, W] of what every image may show, healthy or not: a side marker, wires, an electrode, a pacemaker."""
    shade = np.zeros_like(u)
    if rng.random() < 0.6:
        letter = "R" if rng.random() < 0.5 else "L"
        stencil = np.array([[int(c) for c in row] for row in _LETTERS[letter].split()], dtype=float)
        corner = (-0.80 if letter == "R" else 0.80) + rng.uniform(-0.05, 0.05), rng.uniform(-0.86, -0.70)
        step = rng.uniform(0.035, 0.045)
        rows, columns = (v - corner[1]) / step + 2.0, (u - corner[0]) / step + 2.0
        shade += 0.45 * np.clip(ndimage.map_coordinates(stencil, [rows, columns], order=1, cval=0.0), 0, 1)
    for _ in range(int(rng.random() < 0.25) + int(rng.random() < 0.10)):
        start, slope, bend = rng.uniform(-0.7, 0.7), rng.uniform(-0.6, 0.6), rng.uniform(-0.5, 0.5)
        wire = u - (start + slope * v + bend * v**2)
        shade += 0.16 * np.exp(-((wire / 0.016) ** 2))
    if rng.random() < 0.15:
        at = (rng.uniform(-0.6, 0.6), rng.uniform(-0.45, 0.5))
        shade += 0.22 * edge(ellipse(u, v, at, (0.045, 0.045), 0.0), 0.012)
    if rng.random() < 0.08:
        at = (rng.uniform(0.45, 0.6), rng.uniform(-0.62, -0.5))
        shade += 0.35 * edge(ellipse(u, v, at, (0.12, 0.085), rng.uniform(-0.4, 0.4)), 0.012)
        lead = np.abs((v - at[1]) - 1.5 * (at[0] - u)) / 1.8
        shade += 0.16 * np.exp(-((lead / 0.014) ** 2)) * edge(at[0] - u, 0.02) * edge(u - 0.1, 0.02)
    return shade
