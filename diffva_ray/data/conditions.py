"""Condition images of a ControlNet: lungs and edges computed from the image, or a user's own (edges, segmentation,
depth, sketch), which a column ``condition.NAME`` of a table names.

Computed edges inside the lungs are left out, because they would show the lesion that the counterfactual must remove.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray
from skimage.feature import canny

from diffva_ray.config.stages import CONDITION
from diffva_ray.data.images import BadImage, decode_colours
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


def own_columns(conditions: Collection[str]) -> list[str]:
    """The columns of a user's own condition images among the conditions of ControlNets."""
    return [name for name in conditions if name.startswith(CONDITION)]


def decode_condition(data: bytes, size: int, shape: tuple[int, int]) -> NDArray[np.float32]:
    """A user's condition image [3, size, size] in [0, 1] of an X-ray of ``shape`` (height and width in pixels).

    Both are resized to the model's square, so that they must have the same proportions. Raises BadImage for a file that
    is not an image or has others.
    """
    image, (height, width) = decode_colours(data, size)
    # Rounding to whole pixels moves a side by half a pixel at most.
    if abs(height * shape[1] - width * shape[0]) > max(shape) / 2 + max(height, width) / 2:
        raise BadImage(
            f"has {width} x {height} pixels and its X-ray {shape[1]} x {shape[0]}: other proportions, so that it "
            "cannot lie on the X-ray"
        )
    return image
