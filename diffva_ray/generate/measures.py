"""What is measured on a film and its twin: the same numbers for a run's records and for ``diffva explain``."""

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
    film: NDArray[np.float32],
    counterfactual: NDArray[np.uint8],
    reconstruction: NDArray[np.uint8],
    lungs: NDArray[np.bool_] | None,
    config: GenerateConfig,
    judge: Judge | None,
) -> tuple[dict[str, Any], NDArray[np.float32]]:
    """The numbers of one pair, named as columns of RECORDS, and its signed map in [-1, 1]; all images [size, size].

    Twin and reconstruction are taken as they are stored (8 bit), the film as it was decoded, so that anybody can
    recompute every number from the files.
    """
    healed = unit(counterfactual)
    signed = attribution(film, unit(reconstruction), healed, config)
    multiscale, scales = ms_ssim(film, healed)
    map_energy, in_lungs = energy(signed, lungs)
    judged = judge.healthy_probability(np.stack([film, healed])) if judge is not None else (None, None)
    return {
        "map": config.map_name,
        "ssim": ssim(film, healed, config.ssim_preset),
        "ms_ssim": multiscale,
        "ms_ssim_scales": scales,
        "psnr": psnr(film, healed),
        "l1": l1(film, healed),
        "map_energy": map_energy,
        "map_energy_lung_fraction": in_lungs,
        "judge_source": judged[0],
        "judge_counterfactual": judged[1],
        "pixel_sha256": pixel_digest(counterfactual),
        "map_sha256": pixel_digest(map_levels(signed)),
        "reconstruction_sha256": pixel_digest(reconstruction),
    }, signed
