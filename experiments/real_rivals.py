"""Maps of real images without a counterfactual: the competitors that a map of ``real_images.py`` has to beat.

Every function takes grey images [n, size, size] in [0, 1] and returns maps [n, size, size]; higher is more abnormal.
None has learned from an abnormal image; the learned prior (``real_images.py``) has the boxes of the other half.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from diffva_ray.metrics.localization import centre_prior

Maps = NDArray[np.float32]


def equalised(images: Maps) -> Maps:
    """Images with mean 0 and standard deviation 1 each, so that exposure does not decide."""
    mean, spread = images.mean(axis=(1, 2), keepdims=True), images.std(axis=(1, 2), keepdims=True)
    return ((images - mean) / np.maximum(spread, 1e-3)).astype(np.float32)


def asymmetry(images: Maps) -> Maps:
    """The image minus its mirror image."""
    return images - images[:, :, ::-1]


def pca_residual(images: Maps, normals: Maps, components: int) -> Maps:
    """The image minus its projection on the principal components of normal images."""
    flat, healthy = (equalised(some).reshape(len(some), -1) for some in (images, normals))
    mean = healthy.mean(axis=0)
    axes = np.linalg.svd(healthy - mean, full_matrices=False)[2][:components]
    residual = (flat - mean) - (flat - mean) @ axes.T @ axes
    return residual.reshape(images.shape).astype(np.float32)


def nearest_normals(images: Maps, normals: Maps, count: int) -> Maps:
    """The image minus the mean of the ``count`` normal images that are most like it (Euclidean)."""
    some, pool = equalised(images), equalised(normals)
    flat, others = some.reshape(len(some), -1), pool.reshape(len(pool), -1)
    distances = (flat**2).sum(1)[:, None] - 2 * flat @ others.T + (others**2).sum(1)[None]
    nearest = np.argpartition(distances, count, axis=1)[:, :count]
    return np.stack([one - pool[index].mean(axis=0) for one, index in zip(some, nearest, strict=True)])


def rivals(images: Maps, normals: Maps) -> Iterator[tuple[str, str, Maps]]:
    """Return name, setting and maps of each competitor, for every setting that may be chosen."""
    yield "brightness", "", images
    yield "centre prior", "", np.broadcast_to(centre_prior(images.shape[1]), images.shape)
    yield "asymmetry", "", asymmetry(images)
    for components in (10, 20, 50, 100):
        yield "PCA residual", f"{components} components", pca_residual(images, normals, components)
    for count in (5, 20, 50):
        yield "nearest normals", f"{count} images", nearest_normals(images, normals, count)
