"""Maps of real images without a counterfactual: the competitors that a map of ``real_images.py`` has to beat.

Every function takes grey images [n, size, size] in [0, 1] and returns maps [n, size, size]; higher is more abnormal.
None has learned from an abnormal image; the learned prior (``real_images.py``) has the boxes of the other half.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from diffva_ray.metrics.baselines import NormalComponents, centre_prior, equalised

Maps = NDArray[np.float32]


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
    yield "asymmetry", "", images - images[:, :, ::-1]
    fitted = NormalComponents.of(normals, 100)
    for components in (10, 20, 50, 100):
        yield "PCA residual", f"{components} components", fitted.residual(images, components)
    for count in (5, 20, 50):
        yield "nearest normals", f"{count} images", nearest_normals(images, normals, count)
