"""Attribution maps: what makes a film abnormal, as a signed image in [-1, 1]; positive where the film is brighter than
its healthy twin."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from diffva_ray.config import GenerateConfig
from diffva_ray.metrics.localization import smooth

Image = NDArray[np.float32]


def attribution(film: Image, reconstruction: Image, counterfactual: Image, config: GenerateConfig) -> Image:
    """The recipe's map [H, W] of three grey images [H, W] in [0, 1].

    ``raw`` is the paper's M = I_abnormal - I_counterfactual; ``compensated`` is D(E(I)) - I_counterfactual, which does
    not count the autoencoder's own error as disease. ``smoothing`` is a Gaussian's sigma as a fraction of the width.
    """
    difference = (film if config.difference == "raw" else reconstruction) - counterfactual
    return smooth(difference.astype(np.float64), config.smoothing).astype(np.float32)


def energy(signed_map: Image, lungs: NDArray[np.bool_] | None = None) -> tuple[float, float | None]:
    """Mean |M| of the film, and the fraction of it inside the lungs (None without a mask or without any energy)."""
    magnitude = np.abs(signed_map.astype(np.float64))
    total = float(magnitude.sum())
    inside = float(magnitude[lungs].sum()) / total if lungs is not None and total > 0 else None
    return total / magnitude.size, inside
