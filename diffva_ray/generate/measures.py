"""Computes the metrics of an image and its counterfactual, for a run's records and for ``diffva explain`` alike."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from diffva_ray.config.recipe import GenerateConfig
from diffva_ray.counterfactual.attribution import attribution, energy
from diffva_ray.data.encoding import map_levels, pixel_digest
from diffva_ray.metrics.ssim import l1, psnr, ssim_and_ms_ssim
from diffva_ray.metrics.validity import Judge
from diffva_ray.schema import Results


def unit(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Convert an 8-bit image to float32 in [0, 1]."""
    return pixels.astype(np.float32) / np.float32(255)


def measure(
    image: NDArray[np.float32],
    counterfactual: NDArray[np.uint8],
    reconstruction: NDArray[np.uint8],
    lungs: NDArray[np.bool_] | None,
    config: GenerateConfig,
    judge: Judge | None,
) -> tuple[Results, NDArray[np.float32]]:
    """The metrics of one record and its signed map in [-1, 1]; all arrays [size, size].

    Counterfactual and reconstruction are used as stored (8 bit) and the image as decoded, so that every number can be
    recomputed from the files.
    """
    edited = unit(counterfactual)
    signed_map = attribution(image, unit(reconstruction), edited, config)
    similarity, multiscale, scales = ssim_and_ms_ssim(image, edited, config.ssim_preset)
    attribution_energy, in_lungs = energy(signed_map, lungs)
    healthy = judge.healthy_probability(np.stack([image, edited])).tolist() if judge is not None else (None, None)
    return {
        "attribution_kind": config.map_name,
        "ssim": similarity,
        "ms_ssim": multiscale,
        "ms_ssim_scales": scales,
        "psnr": psnr(image, edited),
        "l1": l1(image, edited),
        "attribution_energy": attribution_energy,
        "attribution_energy_lung_fraction": in_lungs,
        "judge_image": healthy[0],
        "judge_counterfactual": healthy[1],
        "counterfactual_sha256": pixel_digest(counterfactual),
        "attribution_sha256": pixel_digest(map_levels(signed_map)),
        "reconstruction_sha256": pixel_digest(reconstruction),
    }, signed_map
