"""Condition images of a ControlNet: the lung mask, and the edges outside the lungs.

Edges inside the lungs are left out, because they would show the lesion that the counterfactual must remove.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray
from skimage.feature import canny

from diffva_ray.data.lungs import find_lungs

SIGMA = 0.016  # Gaussian smoothing before edge detection, as a fraction of the width


def condition(
    image: NDArray[np.float32], lungs: NDArray[np.bool_] | None, kinds: Collection[str]
) -> NDArray[np.float32]:
    """Condition image [3, H, W] of zeros and ones, from a grey image [H, W] in [0, 1].

    Channels: lungs (the given mask, else the lungs found in the image), edges (Canny 1986), zeros. A channel that is
    not in ``kinds`` (``lungs``, ``edges``) stays zero; so does the lung channel when no lungs are found.
    """
    lung_mask = lungs if lungs is not None and not lungs.all() else find_lungs(image)
    planes = np.zeros((3, *image.shape), np.float32)
    if "lungs" in kinds and lung_mask is not None:
        planes[0] = lung_mask
    if "edges" in kinds:
        edges = canny(image.astype(np.float64), sigma=max(SIGMA * image.shape[1], 0.5))
        planes[1] = edges if lung_mask is None else edges & ~lung_mask
    return planes
