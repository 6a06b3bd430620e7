"""Baselines of attribution maps: signed maps without a counterfactual, which any method has to beat.

None has seen an abnormal image, except ``learned_prior``, which has the lesions of other images and never looks at its
own. ``evaluate.baselines`` chooses their settings on validation images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Map = NDArray[np.float32]

# names of maps, as in tables
BASELINES = (
    "brightness", "asymmetry", "autoencoder_difference", "centre_prior", "pca_residual", "learned_prior",
    "pca_residual x prior",
)  # fmt: skip
WITH_PRIOR = "positive x prior"  # our map times the learned prior
SHUFFLED = "shuffled"  # our map of a validation image

COMPONENTS = 20  # principal components where no validation images choose a number


def brightness(image: Map) -> Map:
    """The image [H, W] in [0, 1] itself: opacities are bright, so any map of opacities has to beat its score."""
    return image


def asymmetry(image: Map) -> Map:
    """The image [H, W] in [0, 1] minus its mirror image: what one lung has and the other has not; in [-1, 1]."""
    return image - image[:, ::-1]


def autoencoder_difference(image: Map, reconstruction: Map) -> Map:
    """I - D(E(I)) of two images [H, W] in [0, 1]: the change by the autoencoder alone; in [-1, 1]."""
    return image - reconstruction


def centre_prior(size: int) -> Map:
    """A Gaussian [size, size] at the centre with peak 1, independent of the image. Its sigma, a quarter of the width,
    is not fitted: it is chosen so that one sigma covers the middle half of the image."""
    offset = (np.arange(size) + 0.5) / size - 0.5
    profile = np.exp(-0.5 * (offset / 0.25) ** 2)
    gaussian: Map = np.outer(profile, profile).astype(np.float32)
    return gaussian


def learned_prior(lesions: Sequence[NDArray[np.bool_]]) -> Map:
    """The mean of other images' lesion masks [H, W]: how often each pixel is abnormal; in [0, 1]."""
    prior: Map = np.mean(np.stack(lesions), axis=0, dtype=np.float32)
    return prior


@dataclass(frozen=True, eq=False)
class NormalComponents:
    """The principal components of normal images."""

    mean: Map  # [size * size]
    axes: Map  # [most, size * size], orthonormal, strongest first

    @classmethod
    def of(cls, normals: Map, most: int) -> NormalComponents:
        """Compute at most ``most`` components of normal images [n, size, size]."""
        flat = equalised(normals).reshape(len(normals), -1)
        mean = flat.mean(axis=0)
        return cls(mean, np.linalg.svd(flat - mean, full_matrices=False)[2][:most])

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        return math.isqrt(len(self.mean))

    def residual(self, images: Map, components: int) -> Map:
        """Images [n, size, size] minus their projection on the first components, in the images' standard deviations."""
        axes = self.axes[:components]
        flat = equalised(images).reshape(len(images), -1) - self.mean
        residual: Map = (flat - flat @ axes.T @ axes).reshape(images.shape).astype(np.float32)
        return residual


def equalised(images: Map) -> Map:
    """Images [n, H, W] with mean 0 and standard deviation 1 each, so that exposure does not decide."""
    mean, spread = images.mean(axis=(1, 2), keepdims=True), images.std(axis=(1, 2), keepdims=True)
    equal: Map = ((images - mean) / np.maximum(spread, 1e-3)).astype(np.float32)
    return equal
