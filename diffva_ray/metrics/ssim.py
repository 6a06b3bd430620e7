"""Similarity of two grey images: SSIM (Wang 2004), MS-SSIM (Wang 2003), PSNR and mean absolute difference.

Images are grey float arrays [H, W] in [0, 1] of equal shape; all values are computed in float64.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from skimage.metrics import structural_similarity

Preset = Literal["wang", "skimage"]

# The presets give different values for the same images, so every SSIM table names its preset.
PRESETS: dict[str, tuple[int, dict[str, object]]] = {  # side of the window, arguments of scikit-image
    "wang": (11, {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}),
    "skimage": (7, {}),
}

WINDOW, SIGMA = 11, 1.5  # of the Gaussian window, in pixels
C1, C2 = 0.01**2, 0.03**2  # (K1 L)^2 and (K2 L)^2 at L = 1
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang 2003, finest scale first; they sum to 1.0001


def ssim(a: NDArray[np.floating], b: NDArray[np.floating], preset: Preset = "wang") -> float:
    """Mean structural similarity (Wang 2004).

    Args:
        a: Grey image [H, W] in [0, 1].
        b: Grey image of the same shape.
        preset: ``wang`` is Wang 2004 (Gaussian window of 11 taps, sigma 1.5, population covariance), ``skimage`` is
            scikit-image's default (uniform window of 7, sample covariance). Both leave out the border where the window
            does not fit.

    Returns:
        SSIM, in [-1, 1]; 1 for equal images.

    Raises:
        ValueError: If the shapes differ, or the images are smaller than the window.

    Examples:
        >>> a = np.linspace(0, 1, 256).reshape(16, 16)
        >>> ssim(a, a), round(ssim(a, 1 - a), 2) < 0
        (1.0, True)
    """
    a, b = _pair(a, b)
    window, arguments = PRESETS[preset]
    if min(a.shape) < window:
        raise ValueError(f"SSIM ({preset}) needs at least {window} pixels a side, got {_size(a)}")
    return float(structural_similarity(a, b, data_range=1.0, **arguments))


def ms_ssim(a: NDArray[np.floating], b: NDArray[np.floating]) -> tuple[float, int]:
    """Multi-scale SSIM (Wang 2003).

    There are five scales from 176 pixels a side. Smaller images have as many as leave 11 pixels at the coarsest, with
    the finest weights renormalised to sum 1: another quantity, not comparable with a five-scale value. Contrast terms
    (and the last scale's SSIM) below 0 count as 0, because they are raised to fractional powers. Between scales pixels
    are averaged 2x2; an odd last row or column is dropped (as in torchmetrics; pytorch-msssim pads).

    Args:
        a: Grey image [H, W] in [0, 1].
        b: Grey image of the same shape.

    Returns:
        MS-SSIM, in [0, 1], and its number of scales.

    Raises:
        ValueError: If the shapes differ, or a side has fewer than 11 pixels.

    Examples:
        >>> ms_ssim(np.ones((64, 64)), np.ones((64, 64)))
        (1.0, 3)
    """
    value, scales, _ = _multiscale(*_pair(a, b))
    return value, scales


def ssim_and_ms_ssim(
    a: NDArray[np.floating], b: NDArray[np.floating], preset: Preset = "wang"
) -> tuple[float, float, int]:
    """SSIM, MS-SSIM and its number of scales, in the time of the second: its finest scale is SSIM by Wang.

    Args:
        a: Grey image [H, W] in [0, 1].
        b: Grey image of the same shape.
        preset: Of the SSIM; see ``ssim``.

    Returns:
        What ``ssim`` (to rounding) and ``ms_ssim`` return.

    Raises:
        ValueError: If the shapes differ, or a side has fewer than 11 pixels.
    """
    value, scales, finest = _multiscale(*_pair(a, b))
    return finest if preset == "wang" else ssim(a, b, preset), value, scales


def _multiscale(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[float, int, float]:
    """MS-SSIM, its number of scales, and the SSIM of the finest one."""
    scales = scales_of(min(a.shape))
    if not scales:
        raise ValueError(f"MS-SSIM needs at least {WINDOW} pixels a side, got {_size(a)}")
    weights = WEIGHTS if scales == len(WEIGHTS) else [w / sum(WEIGHTS[:scales]) for w in WEIGHTS[:scales]]
    value, finest = 1.0, 0.0
    for scale, weight in enumerate(weights):
        similarity, contrast = _terms(a, b)
        finest = finest if scale else similarity
        factor = similarity if scale == scales - 1 else contrast  # eq. 7: luminance enters at the coarsest scale only
        value *= max(factor, 0.0) ** weight
        a, b = _half(a), _half(b)
    return float(value), scales, finest


def scales_of(side: int) -> int:
    """Number of MS-SSIM scales for images whose smaller side is ``side``: 0 (below 11 pixels) to 5 (from 176)."""
    return sum(side // 2**scale >= WINDOW for scale in range(len(WEIGHTS)))


def psnr(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Peak signal-to-noise ratio at data range 1.

    Infinity is not capped: Parquet stores it, and a mean over equal images shows it instead of an arbitrary cap.

    Args:
        a: Grey image [H, W] in [0, 1].
        b: Grey image of the same shape.

    Returns:
        PSNR in dB; ``inf`` for equal images.

    Raises:
        ValueError: If the shapes differ.

    Examples:
        >>> psnr(np.zeros((8, 8)), np.full((8, 8), 0.1)), psnr(np.zeros((8, 8)), np.zeros((8, 8)))
        (20.0, inf)
    """
    a, b = _pair(a, b)
    error = float(np.mean((a - b) ** 2))
    return float("inf") if error == 0 else float(-10 * np.log10(error))


def l1(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Mean absolute difference.

    Args:
        a: Grey image [H, W] in [0, 1].
        b: Grey image of the same shape.

    Returns:
        The mean, in [0, 1].

    Raises:
        ValueError: If the shapes differ.
    """
    a, b = _pair(a, b)
    return float(np.mean(np.abs(a - b)))


def _terms(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[float, float]:
    """Mean SSIM and mean contrast-structure term over the windows that fit."""
    crop = WINDOW // 2

    def local(image: NDArray[np.float64]) -> NDArray[np.float64]:
        means: NDArray[np.float64] = gaussian_filter(image, SIGMA, radius=crop)
        return means[crop:-crop, crop:-crop]

    mean_a, mean_b = local(a), local(b)
    variances = local(a * a + b * b) - mean_a**2 - mean_b**2
    contrast = (2 * (local(a * b) - mean_a * mean_b) + C2) / (variances + C2)
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    return float(np.mean(luminance * contrast)), float(np.mean(contrast))


def _half(image: NDArray[np.float64]) -> NDArray[np.float64]:
    height, width = image.shape[0] // 2, image.shape[1] // 2
    means: NDArray[np.float64] = image[: 2 * height, : 2 * width].reshape(height, 2, width, 2).mean(axis=(1, 3))
    return means


def _pair(a: NDArray[np.floating], b: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"two grey images of one shape are needed, got {a.shape} and {b.shape}")
    return a.astype(np.float64), b.astype(np.float64)


def _size(image: NDArray[np.float64]) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"
