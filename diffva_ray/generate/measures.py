"""What is measured on an image and its counterfactual: the same numbers for a run's records and for ``diffva
explain``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffva_ray.config.recipe import GenerateConfig
from diffva_ray.counterfactual.attribution import attribution, energy
from diffva_ray.data.encoding import map_levels, pixel_digest
from diffva_ray.metrics.ssim import l1, ms_ssim, psnr, ssim
from diffva_ray.metrics.validity import Judge


def unit(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """An 8-bit image as float32 in [0, 1]."""
    return pixels.astype(np.float32) / np.float32(255)


def measure(
    image: NDArray[np.float32],
    counterfactual: NDArray[np.uint8],
    reconstruction: NDArray[np.uint8],
    lungs: NDArray[np.bool_] | None,
    config: GenerateConfig,
    judge: Judge | None,
) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """The numbers of one pair, named as columns of RECORDS, and its signed map in [-1, 1]; all images [size, size].

    Counterfactual and reconstruction are taken as they are stored (8 bit), the image as it was decoded, so that anybody
    can recompute every number from the files.
    """
    generated = unit(counterfactual)
    signed = attribution(image, unit(reconstruction), generated, config)
    multiscale, scales = ms_ssim(image, generated)
    attribution_energy, in_lungs = energy(signed, lungs)
    judged = judge.healthy_probability(np.stack([image, generated])) if judge is not None else (None, None)
    return {
        "map": config.map_name,
        "ssim": ssim(image, generated, config.ssim_preset),
        "ms_ssim": multiscale,
        "ms_ssim_scales": scales,
        "psnr": psnr(image, generated),
        "l1": l1(image, generated),
        "attribution_energy": attribution_energy,
        "attribution_energy_lung_fraction": in_lungs,
        "judge_image": judged[0],
        "judge_counterfactual": judged[1],
        "counterfactual_sha256": pixel_digest(counterfactual),
        "attribution_sha256": pixel_digest(map_levels(signed)),
        "reconstruction_sha256": pixel_digest(reconstruction),
    }, signed
