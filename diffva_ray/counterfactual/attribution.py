"""Attribution maps: what makes an image abnormal, as a signed image in [-1, 1]; positive where the image is brighter
than its healthy counterfactual."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from diffva_ray.config.recipe import GenerateConfig
from diffva_ray.metrics.localization import smooth
from diffva_ray.schema import Image, Mask


def attribution(image: Image, reconstruction: Image, counterfactual: Image, config: GenerateConfig) -> Image:
    """The recipe's signed map [H, W] in [-1, 1] of three grey images [H, W] in [0, 1].

    ``raw`` is M = I_abnormal - I_counterfactual (Siddiqui et al. 2024); ``compensated`` is D(E(I)) - I_counterfactual,
    which does not count the autoencoder's own error as disease. ``smoothing`` is a Gaussian's sigma as a fraction of
    the width. Raises ValueError for images of unequal shapes.

        >>> image, counterfactual = np.full((8, 8), 0.5, np.float32), np.full((8, 8), 0.2, np.float32)
        >>> attribution(image, image, counterfactual, GenerateConfig(difference="raw")).mean().round(3)
        np.float32(0.3)
    """
    if not image.shape == reconstruction.shape == counterfactual.shape or image.ndim != 2:
        shapes = ", ".join(str(one.shape) for one in (image, reconstruction, counterfactual))
        raise ValueError(f"image, reconstruction and counterfactual are [H, W] of one shape, got {shapes}")
    difference = (image if config.difference == "raw" else reconstruction) - counterfactual
    return smooth(difference.astype(np.float64), config.smoothing).astype(np.float32)


def energy(signed_map: Image, lungs: Mask | None = None) -> tuple[float, float | None]:
    """Mean |M| of a map [H, W], in [0, 1], and the fraction of it inside the lungs [H, W], in [0, 1]; None without a
    mask, or without any energy. Raises IndexError for a mask of another shape."""
    magnitude = np.abs(signed_map.astype(np.float64))
    total = float(magnitude.sum())
    inside = float(magnitude[lungs].sum()) / total if lungs is not None and total > 0 else None
    return total / magnitude.size, inside


@dataclass(frozen=True, eq=False)
class Consistency:
    """What K maps of one image, of K seeds, agree on; all [H, W]."""

    mean: Image
    deviation: Image  # standard deviation over seeds (K - 1 in the denominator)
    t: Image  # Student's statistic of the mean against no effect; infinite where all seeds agree on some effect
    significant: Mask


def over_seeds(maps: NDArray[np.float32], level: float = 0.05) -> Consistency:
    """Mean, spread and significance of ``maps`` [K, H, W] in [-1, 1]: a two-sided t test per pixel at ``level``, with K
    - 1 degrees of freedom. The test speaks of the sampler's noise, not of the model's errors, which all seeds share; of
    pixels without any effect a share of ``level`` passes.

    Raises ValueError for fewer than two maps.
    """
    count = len(maps)
    if maps.ndim != 3 or count < 2:
        raise ValueError(f"a spread over seeds takes maps [K, H, W] with K of at least 2, got {list(maps.shape)}")
    values = maps.astype(np.float64)
    mean, deviation = values.mean(axis=0), values.std(axis=0, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic = np.where(mean == 0, 0.0, mean / (deviation / np.sqrt(count)))
    significant = np.abs(statistic) > student.ppf(1 - level / 2, count - 1)
    return Consistency(mean.astype(np.float32), deviation.astype(np.float32), statistic.astype(np.float32), significant)
