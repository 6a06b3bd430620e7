"""Anatomy of a synthetic patient: densities of a chest X-ray as functions of coordinates.

Patient coordinates: u runs from -1 (image left, the patient's right) to 1, v from -1 (neck) to 1 (abdomen). Densities
are functions of continuous coordinates, so an image looks the same at 64 and at 512 px.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def edge(distance: Array, width: float) -> Array:
    """1 inside (distance > 0), 0 outside, with a soft edge of ``width``."""
    return 0.5 * (1.0 + np.tanh(distance / width))


def ellipse(u: Array, v: Array, centre: tuple[float, float], radii: tuple[float, float], angle: float) -> Array:
    """Approximate signed distance to the border of an ellipse (``angle`` in radians), positive inside."""
    du, dv = u - centre[0], v - centre[1]
    cos, sin = np.cos(angle), np.sin(angle)
    radius: Array = np.hypot((du * cos + dv * sin) / radii[0], (-du * sin + dv * cos) / radii[1])
    return (1.0 - radius) * min(radii)


def grid(size: int) -> tuple[Array, Array]:
    """Pixel centres in image coordinates, each [size, size] in (-1, 1)."""
    line = (np.arange(size) + 0.5) / size * 2 - 1
    v, u = np.meshgrid(line, line, indexing="ij")
    return u, v


def lattice_noise(rng: np.random.Generator, nodes: int, size: int) -> Array:
    """Smooth noise [size, size] of about unit variance on a lattice of ``nodes`` cells; the same field at any size."""
    values = rng.standard_normal((nodes + 3, nodes + 3))
    position = (np.arange(size) + 0.5) / size * nodes + 1.0
    distance = np.abs(position[:, None] - np.arange(nodes + 3)[None, :])
    spline = np.where(  # cubic B-spline
        distance < 1, 2 / 3 - distance**2 + distance**3 / 2, np.clip(2 - distance, 0, None) ** 3 / 6
    )
    return spline @ values @ spline.T / 0.48  # the spline reduces the standard deviation to about 0.48


@dataclass(frozen=True)
class Vessel:
    """A vessel that starts at the hilum of one lung. Lengths are in patient coordinates."""

    side: int  # -1: image left
    angle: float  # at the hilum, in radians
    bend: float  # curvature
    length: float
    width: float  # at the hilum; narrows to 0.45 of it
    strength: float  # density


@dataclass(frozen=True)
class Thorax:
    """One patient, as sampled by ``sample``; no field depends on a lesion. Pairs of lungs: image left, image right."""

    scale: float  # size of the patient in the image
    shift: tuple[float, float]  # of the patient in the image
    rotation: float  # of the patient in the image, in radians
    body: tuple[float, float]  # half width of the torso, and the exponent of its outline
    lung_width: tuple[float, float]  # distance of the lateral border from the midline
    lung_base: tuple[float, float]  # v of the lower border
    lung_apex: float  # v of the upper border
    lung_density: tuple[float, float]  # density that air removes
    lung_gradient: float  # change of lung_density from neck to abdomen
    breast: float  # density of breast tissue over the lungs
    heart_centre: tuple[float, float]  # u, v
    heart_radii: tuple[float, float]  # along both axes
    heart_angle: float  # of the heart's axis, in radians
    mediastinum: float  # half width
    rib_first: float  # v of the first rib
    rib_spacing: float  # distance of neighbouring ribs
    rib_strength: float  # density
    rib_tilt: float  # curvature of the ribs' back part
    clavicle: float  # v of the clavicles
    abdomen: float  # added density below the lungs
    stomach: float  # density that the stomach's air bubble removes
    vessels: tuple[Vessel, ...] = field(repr=False)  # of both lungs
    bone: float = 1.0  # density of ribs, clavicles and vertebrae, times the usual one
    aorta: float = 1.0  # radius of the aortic knob, times the usual one
    heart_size: float = 1.0  # size of the heart, times the usual one
    scapula: float = 0.0  # density of the shoulder blades over the lungs

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Thorax:
        """Samples a patient; the order of the calls to ``rng`` is frozen."""
        uniform = rng.uniform
        lung = uniform(0.66, 0.76)
        base = uniform(0.44, 0.58)
        density = uniform(0.38, 0.44)
        vessels = tuple(
            Vessel(
                side=side,
                angle=angle + uniform(-0.14, 0.14),
                bend=uniform(-0.35, 0.35),
                length=uniform(0.38, 0.62),
                width=uniform(0.018, 0.034),
                strength=uniform(0.10, 0.20),
            )
            for side in (-1, 1)
            for angle in np.linspace(-1.25, 1.2, int(rng.integers(5, 8)))
        )
        return cls(
            scale=uniform(0.93, 1.08),
            shift=(uniform(-0.05, 0.05), uniform(-0.05, 0.05)),
            rotation=np.deg2rad(uniform(-4, 4)),
            body=(uniform(0.93, 1.06), uniform(2.4, 3.2)),
            lung_width=(lung + uniform(-0.02, 0.02), lung + uniform(-0.02, 0.02)),
            lung_base=(base - uniform(0.02, 0.08), base),
            lung_apex=uniform(-0.84, -0.74),
            lung_density=(density + uniform(-0.035, 0.035), density + uniform(-0.035, 0.035)),
            lung_gradient=uniform(-0.20, 0.02),
            breast=uniform(0.0, 0.20),
            heart_centre=(uniform(0.13, 0.18), uniform(0.22, 0.30)),
            heart_radii=(uniform(0.30, 0.35), uniform(0.20, 0.24)),
            heart_angle=uniform(0.35, 0.65),
            mediastinum=uniform(0.105, 0.145),
            rib_first=uniform(-0.66, -0.56),
            rib_spacing=uniform(0.15, 0.175),
            rib_strength=uniform(0.085, 0.125),
            rib_tilt=uniform(0.28, 0.42),
            clavicle=uniform(-0.70, -0.62),
            abdomen=uniform(0.06, 0.13),
            stomach=uniform(0.0, 0.14),
            vessels=vessels,
        )

    def coordinates(self, u: Array, v: Array) -> tuple[Array, Array]:
        """Image coordinates to patient coordinates: undoes shift, rotation and scale."""
        u, v = (u - self.shift[0]) / self.scale, (v - self.shift[1]) / self.scale
        cos, sin = np.cos(self.rotation), np.sin(self.rotation)
        return u * cos + v * sin, -u * sin + v * cos

    def lung(self, u: Array, v: Array, side: int) -> Array:
        """Approximate signed distance to the border of one lung (side -1: image left), positive inside."""
        index = (side + 1) // 2
        across = side * u
        base = self.lung_base[index]
        fraction = np.clip((v - self.lung_apex) / (base - self.lung_apex), 0.0, 1.0)
        opening = (1.0 - (1.0 - fraction) ** 2.3) ** 0.6
        lateral = 0.31 + (self.lung_width[index] - 0.31) * opening
        medial = 0.31 - (0.31 - self.mediastinum) * opening
        dome = base - 0.17 * (1.0 - ((across - 0.36) / 0.41) ** 2)
        inside: Array = np.minimum.reduce([lateral - across, across - medial, dome - v, v - self.lung_apex])
        return inside

    def heart(self, u: Array, v: Array, scale: float = 1.0) -> Array:
        """Approximate signed distance to the border of the heart, positive inside; ``scale`` > 1 is cardiomegaly."""
        scale = scale * self.heart_size
        radii = (self.heart_radii[0] * scale, self.heart_radii[1] * (0.5 + 0.5 * scale))
        centre = (self.heart_centre[0] * (0.4 + 0.6 * scale), self.heart_centre[1])
        atrium = ellipse(u, v, (-0.055, self.heart_centre[1] - 0.02), (0.15 * scale, 0.21), 0.0)
        return np.maximum(ellipse(u, v, centre, radii, self.heart_angle), atrium)

    def lungs(self, u: Array, v: Array, width: float, heart_scale: float = 1.0) -> Array:
        """Visible lung field in [0, 1]: both lungs without the shadow of the heart."""
        both = np.maximum(edge(self.lung(u, v, -1), width), edge(self.lung(u, v, 1), width))
        return both * (1.0 - edge(self.heart(u, v, heart_scale), 1.5 * width))

    def density(self, u: Array, v: Array, width: float, heart_scale: float = 1.0) -> Array:
        """Density [H, W] (about 0 to 1, bright is dense) at patient coordinates, with edges of ``width``."""
        # torso
        air = self.lungs(u, v, width, heart_scale)
        across = np.abs(u)
        torso = edge(
            1.0
            - (across / self.body[0]) ** self.body[1] * (0.82 + 0.18 * v)
            - 0.9 * edge(-0.86 - v, 0.07) * np.clip(across - 0.24, 0, 1),
            0.06,
        )
        # mediastinum, spine, heart and great vessels
        below = edge(v - (min(self.lung_base) - 0.10), 0.05)
        density = torso * (0.60 + 0.03 * v + self.abdomen * below)
        density += 0.10 * np.exp(-((u / (0.9 * self.mediastinum)) ** 2)) * torso
        density += 0.025 * self.bone * np.exp(-((u / 0.055) ** 2)) * np.cos(v / 0.058 * np.pi) * torso  # vertebrae
        density += 0.09 * edge(self.heart(u, v, heart_scale), 1.5 * width)
        knob = 0.085 * self.aorta
        density += 0.06 * edge(ellipse(u, v, (0.115, -0.34), (knob, knob), 0.0), 1.5 * width)  # aortic knob
        # air in trachea and stomach
        trachea = edge(0.036 - np.abs(u + 0.008), 0.015) * edge(-0.20 - v, 0.03)
        density -= 0.11 * trachea * torso
        bubble = edge(ellipse(u, v, (0.36, max(self.lung_base) + 0.06), (0.13, 0.07), 0.1), 0.025)
        density -= self.stomach * bubble
        # lungs, vessels and ribs
        aerated = np.where(u < 0, *self.lung_density) + self.lung_gradient * v
        aerated -= self.breast * np.exp(-(((across - 0.42) / 0.30) ** 2) - (((v - 0.30) / 0.24) ** 2))
        density -= air * (aerated + 0.10 * np.clip(across - 0.40, -0.25, 0.3))
        density += air * self._vessels(u, v)
        density += self._ribs(u, v) * torso * (0.35 + 0.65 * air) * (1 - below * (1 - air))
        if self.scapula:
            blade = edge(ellipse(across, v, (0.53, -0.36), (0.12, 0.34), -0.22), 1.5 * width)
            density += self.scapula * self.bone * blade * torso
        return density

    def _vessels(self, u: Array, v: Array) -> Array:
        """Density of the hila and the vessels."""
        shade = np.zeros_like(u)
        for side in (-1, 1):
            hilum = ((side * u - 0.20) / 0.10) ** 2 + ((v + 0.03) / 0.13) ** 2
            shade += 0.20 * np.exp(-hilum)
        for vessel in self.vessels:
            du, dv = vessel.side * u - 0.15, v + 0.03
            cos, sin = np.cos(vessel.angle), np.sin(vessel.angle)
            along, aside = du * cos + dv * sin, -du * sin + dv * cos
            rest = np.clip(1.0 - along / vessel.length, 0.0, 1.0)
            off = (aside - vessel.bend * along**2) / (vessel.width * (0.45 + 0.55 * rest))
            shade += vessel.strength * rest**0.7 * np.exp(-(off**2)) * np.clip(along / 0.12, 0, 1)
        return shade

    def _ribs(self, u: Array, v: Array) -> Array:
        """Density of the ribs (back and front parts) and the clavicles."""
        across = np.abs(u)
        cage = edge(0.80 - across, 0.05) * edge(across - 0.09, 0.03)
        outer = edge(across - 0.30, 0.1)
        shade = np.zeros_like(u)
        for rib in range(8):
            start = self.rib_first + rib * self.rib_spacing
            back = start - 0.05 + self.rib_tilt * (across - 0.22) ** 2
            front = start + 0.10 + 0.42 * (0.72 - across)
            off = ((v - back) / 0.037) ** 2
            shade += self.rib_strength * np.exp(-(off**2)) * (0.75 + 0.45 * off) * cage  # the cortex is brighter
            off = ((v - front) / 0.04) ** 2
            shade += 0.40 * self.rib_strength * np.exp(-(off**2)) * cage * outer
        bone = v - (self.clavicle + 0.13 * np.cos(2.6 * across + 0.3) * 0.5 - 0.10 * across + 0.06)
        shade += 0.10 * np.exp(-(((bone / 0.034) ** 2) ** 2)) * edge(across - 0.07, 0.02) * edge(0.86 - across, 0.04)
        return self.bone * shade
