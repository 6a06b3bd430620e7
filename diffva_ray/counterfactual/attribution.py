"""Attribution maps: the signed difference, in [-1, 1], between an image and its healthy counterfactual; positive where
the image is brighter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from diffva_ray.config.recipe import GenerateConfig
from diffva_ray.metrics.localization import smooth
from diffva_ray.schema import Image, Mask


def attribution(image: Image, reconstruction: Image, counterfactual: Image, config: GenerateConfig) -> Image:
    """Signed attribution map of an image, of the recipe's kind.

    Args:
        image: Grey image [H, W] in [0, 1].
        reconstruction: The method's output without an edit, D(E(I)), of the same shape and range.
        counterfactual: The healthy counterfactual, of the same shape and range.
        config: Recipe section ``generate``, of which two fields are read. ``difference``: ``raw`` is
            M = I - I_counterfactual (Siddiqui et al. 2024); ``compensated`` is D(E(I)) - I_counterfactual, which does
            not count the autoencoder's own error as disease. ``smoothing``: sigma of a Gaussian, as a fraction of the
            width.

    Returns:
        The map [H, W], float32 in [-1, 1].

    Raises:
        ValueError: If the images are not [H, W] of one shape.

    Examples:
        >>> image, counterfactual = np.full((8, 8), 0.5, np.float32), np.full((8, 8), 0.2, np.float32)
        >>> attribution(image, image, counterfactual, GenerateConfig(difference="raw")).mean().round(3)
        np.float32(0.3)
    """
    if not image.shape == reconstruction.shape == counterfactual.shape or image.ndim != 2:
        shapes = f"{image.shape}, {reconstruction.shape}, {counterfactual.shape}"
        raise ValueError(f"image, reconstruction and counterfactual are [H, W] of one shape, got {shapes}")
    difference = (image if config.difference == "raw" else reconstruction) - counterfactual
    return smooth(difference.astype(np.float64), config.smoothing).astype(np.float32)


def energy(signed_map: Image, lungs: Mask | None = None) -> tuple[float, float | None]:
    """Energy of a map, and how much of it is inside the lungs.

    Args:
        signed_map: Attribution map [H, W] in [-1, 1].
        lungs: Lung mask, bool [H, W].

    Returns:
        Mean |M|, in [0, 1], and the fraction of the sum of |M| inside the lungs, in [0, 1]; the fraction is None
        without a mask, and for a map of zeros.

    Raises:
        IndexError: If the mask has another shape.
    """
    magnitude = np.abs(signed_map.astype(np.float64))
    total = float(magnitude.sum())
    inside = float(magnitude[lungs].sum()) / total if lungs is not None and total > 0 else None
    return total / magnitude.size, inside


@dataclass(frozen=True, eq=False)
class Consistency:
    """Agreement of K maps of one image, one per seed; every field is [H, W]."""

    mean: Image  # mean over seeds, in [-1, 1]
    deviation: Image  # standard deviation over seeds (K - 1 in the denominator)
    t: Image  # Student's statistic of the mean against no effect; infinite where all seeds agree on some effect
    significant: Mask  # where |t| is beyond the quantile of the level


def over_seeds(maps: NDArray[np.float32], level: float = 0.05) -> Consistency:
    """Mean, spread and significance over seeds: a two-sided t test per pixel with K - 1 degrees of freedom.

    The test covers the sampler's noise only, not errors of the model, which all seeds share. A fraction ``level`` of
    the pixels without any effect passes.

    Args:
        maps: Attribution maps [K, H, W] in [-1, 1] of one image, one per seed.
        level: Significance level, in (0, 1).

    Returns:
        Mean, standard deviation, t statistic and significant pixels.

    Raises:
        ValueError: If there are fewer than two maps, or the array is not [K, H, W].
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
