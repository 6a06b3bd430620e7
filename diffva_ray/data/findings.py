"""Findings of real chest X-rays, drawn for the lungs of a real image: wider in size, density and shape than the lesions
of phantoms, because a model that removes them has to recognise those of patients.

Coordinates and densities are those of ``thorax``; the lungs reach from -0.80 (apex) to 0.50 (base).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import ndimage

from diffva_ray.data.lesions import Anatomy, Lesion
from diffva_ray.data.thorax import Array, edge, ellipse, lattice_noise

APEX, BASE = -0.80, 0.50


def _side(rng: np.random.Generator) -> int:
    return -1 if rng.random() < 0.5 else 1


def _factors(sides: list[int], severity: float) -> dict[str, object]:
    """Factors for the set's JSON: the patient's sides (image left is the right), and the largest opacity."""
    names = sorted({"right" if side < 0 else "left" for side in sides})
    return {"sides": names, "severity": round(severity, 3)}


def _in_lung(rng: np.random.Generator, lungs: Anatomy, side: int, depth: float = 0.03) -> tuple[float, float]:
    """A point at least ``depth`` inside a lung, by rejection sampling."""
    for _ in range(100):
        u, v = side * rng.uniform(0.08, 0.72), rng.uniform(APEX + 0.06, BASE)
        if float(lungs.lung(np.array(u), np.array(v), side)) > depth:
            return u, v
    return side * 0.42, -0.1


def _texture(rng: np.random.Generator, size: int, amount: float) -> Array:
    """A factor around 1 that varies at several scales, [size, size]."""
    coarse, fine = (
        lattice_noise(rng, int(rng.integers(4, 9)), size),
        lattice_noise(rng, int(rng.integers(12, 28)), size),
    )
    factor: Array = np.clip(1 + amount * (0.6 * coarse + 0.4 * fine), 0.1, 1.6)
    return factor


def _patch(rng: np.random.Generator, u: Array, v: Array, at: tuple[float, float], radius: float, soft: float) -> Array:
    """A cluster of soft ellipses around a point, [size, size] in [0, 1]."""
    parts = int(rng.integers(1, 7))
    clear = np.ones_like(u)
    for _ in range(parts):
        spread = radius * (0.0 if parts == 1 else 0.8)
        centre = at[0] + rng.normal() * spread, at[1] + rng.normal() * spread
        aspect, size = rng.uniform(0.55, 1.8), radius * rng.uniform(0.5, 1.0)
        distance = ellipse(u, v, centre, (size * aspect**0.5, size / aspect**0.5), rng.uniform(0, np.pi))
        clear = clear * (1 - rng.uniform(0.5, 1.0) * edge(distance, soft * size))
    return 1 - clear


def _towards(rng: np.random.Generator, u: Array, low: float = 0.52, high: float = 0.68) -> Array:
    return np.full_like(u, rng.uniform(low, high))


def lung_opacity(rng: np.random.Generator, lungs: Anatomy, u: Array, v: Array) -> Lesion:
    """Patches of any size and density, the consolidation of a lobe, or haze over a zone."""
    severity = float(np.exp(rng.uniform(np.log(0.22), np.log(0.9))))
    kind = rng.random()
    sides = [_side(rng)] if rng.random() < 0.6 else [-1, 1]
    opacity = np.zeros_like(u)
    for side in sides:
        own = edge(lungs.lung(u, v, side), 0.02)
        if kind < 0.60:  # patches
            for _ in range(int(rng.integers(1, 4))):
                radius, soft = rng.uniform(0.06, 0.28), rng.uniform(0.25, 0.9)
                patch = _patch(rng, u, v, _in_lung(rng, lungs, side), radius, soft)
                opacity = np.maximum(opacity, rng.uniform(0.6, 1.0) * own * patch)
        elif kind < 0.80:  # a lobe: one side of a fissure
            at, slope = rng.uniform(-0.45, 0.3), rng.uniform(-0.45, 0.45)
            border = v - at - slope * (side * u - 0.4)
            lobe = edge(border if rng.random() < 0.7 else -border, rng.uniform(0.01, 0.12))
            opacity = np.maximum(opacity, own * lobe)
        else:  # haze that fades away from its centre
            centre = side * rng.uniform(0.2, 0.5), rng.uniform(-0.3, 0.45)
            width, height = rng.uniform(0.18, 0.40), rng.uniform(0.22, 0.60)
            haze = np.exp(-0.5 * (((u - centre[0]) / width) ** 2 + ((v - centre[1]) / height) ** 2))
            opacity = np.maximum(opacity, own * haze)
    opacity = np.clip(severity * opacity * _texture(rng, len(u), rng.uniform(0, 0.5)), 0, 0.97)
    return Lesion(opacity, _towards(rng, u), factors=_factors(sides, severity))


def effusion(rng: np.random.Generator, lungs: Anatomy, u: Array, v: Array) -> Lesion:
    """Fluid at the base of one or two lungs, from a blunted angle to half a lung; its level rises to the chest wall."""
    severity = rng.uniform(0.55, 0.97)
    sides = [_side(rng)] if rng.random() < 0.7 else [-1, 1]
    opacity = np.zeros_like(u)
    for side in sides:
        own = edge(lungs.lung(u, v, side), 0.015)
        lateral = np.clip((side * u - 0.12) / 0.58, 0, 1.2)
        level = BASE - rng.uniform(0.0, 0.12) - rng.exponential(0.18)
        surface = level - rng.uniform(0.05, 0.35) * lateral ** rng.uniform(1.5, 4)
        soft = rng.uniform(0.02, 0.16)
        opacity = np.maximum(opacity, own * edge(v - np.maximum(surface, APEX + 0.2), soft))
    opacity = np.clip(severity * opacity * _texture(rng, len(u), rng.uniform(0, 0.15)), 0, 0.98)
    return Lesion(opacity, _towards(rng, u, 0.58, 0.74), factors=_factors(sides, severity))


def atelectasis(rng: np.random.Generator, lungs: Anatomy, u: Array, v: Array) -> Lesion:
    """Bands, mostly in the lower half of a lung, or a wedge from hilum or base."""
    severity = rng.uniform(0.3, 0.9)
    sides = [_side(rng)] if rng.random() < 0.65 else [-1, 1]
    opacity = np.zeros_like(u)
    for side in sides:
        own = edge(lungs.lung(u, v, side), 0.02)
        if rng.random() < 0.55:  # bands
            for _ in range(int(rng.integers(1, 4))):
                at = side * rng.uniform(0.2, 0.6), rng.uniform(-0.1, 0.45)
                radii = rng.uniform(0.12, 0.34), rng.uniform(0.012, 0.055)
                band = edge(ellipse(u, v, at, radii, rng.normal() * 0.35), rng.uniform(0.01, 0.03))
                opacity = np.maximum(opacity, rng.uniform(0.6, 1) * own * band)
        else:  # a wedge that widens from the hilum to the base, or along the heart
            apex = side * rng.uniform(0.1, 0.25), rng.uniform(-0.2, 0.15)
            down, out = v - apex[1], side * (u - apex[0])
            wedge = edge(down, 0.05) * edge(rng.uniform(0.3, 1.1) * np.abs(down) - np.abs(out), rng.uniform(0.02, 0.1))
            opacity = np.maximum(opacity, own * wedge)
    opacity = np.clip(severity * opacity * _texture(rng, len(u), rng.uniform(0, 0.3)), 0, 0.97)
    return Lesion(opacity, _towards(rng, u), factors=_factors(sides, severity))


def _round(rng: np.random.Generator, lungs: Anatomy, u: Array, v: Array, radius: tuple[float, float]) -> Lesion:
    """Round opacities with a rather sharp, wavy border."""
    severity = rng.uniform(0.35, 0.95)
    sides = []
    opacity = np.zeros_like(u)
    for _ in range(1 if rng.random() < 0.7 else int(rng.integers(2, 5))):
        sides.append(_side(rng))
        at, size = _in_lung(rng, lungs, sides[-1], -0.01), rng.uniform(*radius)
        direction, phase = np.arctan2(v - at[1], u - at[0]), rng.uniform(0, 2 * np.pi, 3)
        wobble = sum(rng.uniform(0, 0.12) * np.sin((k + 2) * direction + phase[k]) for k in range(3))
        aspect = rng.uniform(0.75, 1.33)
        distance = ellipse(u, v, at, (size * aspect**0.5, size / aspect**0.5), rng.uniform(0, np.pi)) + size * wobble
        opacity = np.maximum(opacity, severity * edge(distance, rng.uniform(0.1, 0.5) * size))
    return Lesion(opacity, _towards(rng, u, 0.55, 0.72), factors=_factors(sides, severity))


def mass(rng: np.random.Generator, lungs: Anatomy, u: Array, v: Array) -> Lesion:
    """One mass, or several."""
    return _round(rng, lungs, u, v, (0.09, 0.26))


def nodule(rng: np.random.Generator, lungs: Anatomy, u: Array, v: Array) -> Lesion:
    """One nodule, or several."""
    return _round(rng, lungs, u, v, (0.035, 0.09))


def pneumothorax(rng: np.random.Generator, lungs: Anatomy, u: Array, v: Array) -> Lesion:
    """Air between lung and chest wall: a darker rim without vessels, widest at the apex or the side, and the pleural
    line; the collapsed lung behind it is denser."""
    side, depth, collapse = _side(rng), rng.uniform(0.06, 0.36), rng.uniform(0, 0.3)
    inside = lungs.lung(u, v, side)
    height = np.clip((v - APEX) / (BASE - APEX), 0, 1)  # 0 at the apex
    wide = depth * (1 - rng.uniform(0, 1) * height) * (1 - rng.uniform(0, 1) * (1 - height))
    outer = edge(side * u - rng.uniform(0.1, 0.35) * height - 0.05, 0.06)  # not along the mediastinum
    rim = edge(inside, 0.015) * edge(wide - inside, 0.015) * outer
    line = np.exp(-(((inside - wide) / rng.uniform(0.010, 0.022)) ** 2)) * outer * (wide > 0.03)
    lung = edge(inside - wide, 0.03)
    severity = rng.uniform(0.5, 0.95)
    return Lesion(
        severity * rim,
        np.full_like(u, rng.uniform(0.10, 0.24)),
        extra=rng.uniform(0.02, 0.10) * line + 0.15 * collapse * lung * ndimage.gaussian_filter(lung, len(u) / 20),
        factors=_factors([side], severity),
    )


FINDINGS: dict[str, Callable[[np.random.Generator, Anatomy, Array, Array], Lesion]] = {
    "Lung_Opacity": lung_opacity,
    "Effusion": effusion,
    "Atelectasis": atelectasis,
    "Mass": mass,
    "Nodule": nodule,
    "Pneumothorax": pneumothorax,
}
