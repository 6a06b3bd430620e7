"""Structure that a ControlNet is conditioned on: where the lungs are, and the edges of everything outside them.

Edges inside the lungs would carry the lesion that is to be generated, so they are left out; ribs that cross the lungs
are kept outside them, and the lungs' own outline is the edge of their mask.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray
from skimage.feature import canny

from diffva_ray.data.lungs import find_lungs

SIGMA = 0.016  # of the smoothing before edges are taken, as a fraction of the width


def condition(
    image: NDArray[np.float32], lungs: NDArray[np.bool_] | None, kinds: Collection[str]
) -> NDArray[np.float32]:
    """Condition image [3, H, W] of zeros and ones, of a grey image [H, W] in [0, 1]: lungs (the mask given, or the
    lungs found), edges (Canny 1986), nothing. A kind that is not among ``kinds`` (``lungs``, ``edges``) stays zero, as
    do lungs that nobody finds."""
    found = lungs if lungs is not None and not lungs.all() else find_lungs(image)
    planes = np.zeros((3, *image.shape), np.float32)
    if "lungs" in kinds and found is not None:
        planes[0] = found
    if "edges" in kinds:
        edges = canny(image.astype(np.float64), sigma=max(SIGMA * image.shape[1], 0.5))
        planes[1] = edges if found is None else edges & ~found
    return planes
