"""The part of an attribution map above a threshold, as COCO annotations and DICOM segmentations hold it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from diffva_ray.evaluate.direction import direction
from diffva_ray.export.examples import Example
from diffva_ray.generate.run import Run


def signed_map(run: Run, example: Example) -> NDArray[np.float32]:
    """The attribution map with positive values where the image shows the finding."""
    signed: NDArray[np.float32] = direction(run, dict(example.record)) * example.attribution
    return signed


def above(run: Run, example: Example, threshold: float) -> NDArray[np.bool_]:
    """Where that map is above ``threshold``, inside the lungs if these are known."""
    mask: NDArray[np.bool_] = signed_map(run, example) > threshold
    return mask if example.truth.region is None else mask & example.truth.region
