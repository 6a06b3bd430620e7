"""Differences between X-rays that are no disease: position, exposure, sharpness, noise, haze and devices.

Training images that vary in them teach a model to leave them alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from diffva_ray.data.lesions import distractors
from diffva_ray.data.thorax import Array, grid, lattice_noise
from diffva_ray.schema import Mask


class Acquisition:
    """One sampled way to take an image of ``size`` pixels; an instance applies to an image and its ground truth."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self.size, self.flip = size, bool(rng.random() < 0.5)
        angle, shear = rng.normal() * 0.05, rng.normal() * 0.03
        scale = np.exp(rng.normal(size=2) * 0.06)
        self.matrix = np.array([[np.cos(angle), shear - np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
        self.shift = rng.normal(size=2) * 0.025 * size
        self.gamma, self.gain, self.fog = np.exp(rng.normal() * 0.2), np.exp(rng.normal() * 0.12), rng.normal() * 0.04
        self.blur = abs(rng.normal()) * 0.7 * size / 128
        self.sharpen = rng.uniform(0, 0.8) * (rng.random() < 0.4)
        self.haze = rng.normal() * 0.05 * lattice_noise(rng, 2, size)
        noise = rng.normal(size=(size, size))
        self.noise = abs(rng.normal()) * 0.012 * (noise if rng.random() < 0.5 else ndimage.gaussian_filter(noise, 0.7))
        self.devices = rng.uniform(0.2, 1.0) * distractors(rng, *grid(size)) * (rng.random() < 0.6)

    def place(self, image: NDArray[np.generic], order: int = 1) -> Array:
        """Turn, scale, move and perhaps mirror an image [size, size]."""
        middle = (self.size - 1) / 2
        offset = middle - self.matrix @ (np.array([middle, middle]) + self.shift)
        flipped = image[:, ::-1] if self.flip else image
        placed: Array = ndimage.affine_transform(flipped.astype(np.float64), self.matrix, offset, order=order)
        return placed

    def place_mask(self, mask: Mask) -> Mask:
        placed: Mask = self.place(mask, order=0) > 0.5
        return placed

    def expose(self, image: Array) -> Array:
        """The image [size, size] in [0, 1] under this exposure, with its devices, sharpness and noise."""
        bright = np.clip(image + self.devices, 0, 1)
        if self.blur > 0.2:
            bright = ndimage.gaussian_filter(bright, self.blur)
        if self.sharpen:
            bright = bright + self.sharpen * (bright - ndimage.gaussian_filter(bright, self.size / 64))
        bright = np.clip(bright, 0, 1) ** self.gamma
        exposed: Array = np.clip((bright - 0.5) * self.gain + 0.5 + self.fog + self.haze + self.noise, 0, 1)
        return exposed
