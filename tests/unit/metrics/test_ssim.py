"""SSIM, MS-SSIM, PSNR and L1: identities, an independent MS-SSIM, and refused sizes."""

import math

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.signal import convolve2d
from skimage.metrics import structural_similarity

from diffva_ray.metrics.ssim import l1, ms_ssim, psnr, scales_of, ssim, ssim_and_ms_ssim


def images(side: int, noise: float = 0.1, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A smooth random image and the same under noise."""
    random = np.random.default_rng(side)
    shape = (side, width or side)
    a = np.clip(0.5 + 3 * gaussian_filter(random.standard_normal(shape), 4), 0, 1)
    b = np.clip(a + noise * random.standard_normal(shape), 0, 1)
    return a.astype(np.float32), b.astype(np.float32)


def naive_ms_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang 2003 by direct two-dimensional convolution; sides divisible by 16 stay even between scales."""
    taps = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(taps, taps) / taps.sum() ** 2
    value = 1.0
    a, b = a.astype(float), b.astype(float)
    for scale, weight in enumerate([0.0448, 0.2856, 0.3001, 0.2363, 0.1333]):
        ma, mb = convolve2d(a, window, "valid"), convolve2d(b, window, "valid")
        va, vb = convolve2d(a * a, window, "valid") - ma**2, convolve2d(b * b, window, "valid") - mb**2
        covariance = convolve2d(a * b, window, "valid") - ma * mb
        term = (2 * covariance + 0.0009) / (va + vb + 0.0009)
        if scale == 4:
            term = term * (2 * ma * mb + 0.0001) / (ma**2 + mb**2 + 0.0001)
        value *= term.mean() ** weight
        a, b = (convolve2d(image, np.full((2, 2), 0.25), "valid")[::2, ::2] for image in (a, b))
    return value


@pytest.mark.parametrize("side", [176, 256])
def test_ms_ssim_equals_a_direct_computation(side):
    a, b = images(side)
    value, scales = ms_ssim(a, b)
    assert scales == 5
    assert value == pytest.approx(naive_ms_ssim(a, b), abs=1e-9)
    assert 0.5 < value < 0.99


@pytest.mark.parametrize(("side", "scales"), [(10, 0), (11, 1), (22, 2), (64, 3), (175, 4), (176, 5), (2048, 5)])
def test_scales_follow_the_smaller_side(side, scales):
    assert scales_of(side) == scales


@pytest.mark.parametrize("side", [11, 64, 65, 175, 176, 177])
def test_equal_images_score_one(side):
    a, b = images(side)
    value, scales = ms_ssim(a, a)
    assert value == pytest.approx(1)
    assert scales == scales_of(side)
    assert ssim(a, a) == pytest.approx(1)
    assert ssim(a, a, "skimage") == pytest.approx(1)
    assert l1(a, a) == 0
    assert psnr(a, a) == math.inf
    assert 0 < ms_ssim(a, b)[0] < 1


def test_fewer_scales_are_weighted_to_one():
    """With one scale MS-SSIM is Wang's SSIM; an unnormalised weight (0.0448) would give nearly 1."""
    a, b = images(16)
    assert ms_ssim(a, b) == (pytest.approx(ssim(a, b), abs=1e-6), 1)


@pytest.mark.parametrize("shape", [(11, 11), (64, 64), (65, 33), (200, 180)])
@pytest.mark.parametrize("preset", ["wang", "skimage"])
def test_both_at_once_are_those_of_scikit_image_and_of_ms_ssim(shape, preset):
    rng = np.random.default_rng(0)
    a = rng.random(shape)
    b = np.clip(a + 0.1 * rng.normal(size=shape), 0, 1)
    value, *multiscale = ssim_and_ms_ssim(a, b, preset)
    assert value == pytest.approx(ssim(a, b, preset), abs=1e-13)
    assert tuple(multiscale) == ms_ssim(a, b)


def test_an_odd_last_row_is_dropped():
    a, b = images(64)
    wider = [np.pad(image, ((0, 0), (0, 1)), mode="edge") for image in (a, b)]
    assert ms_ssim(*wider)[0] == pytest.approx(ms_ssim(a, b)[0], abs=0.01)


def test_anti_correlated_images_are_zero_not_nan():
    a, _ = images(176)
    assert ms_ssim(a, 1 - a) == (0.0, 5)
    assert ssim(a, 1 - a) < 0


def test_measures_are_symmetric():
    a, b = images(64)
    for measure in (ssim, ms_ssim, psnr, l1):
        assert measure(a, b) == pytest.approx(measure(b, a))


def test_presets_are_scikit_image_s():
    a, b = images(64)
    wang = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    assert ssim(a, b) == pytest.approx(structural_similarity(a, b, data_range=1.0, **wang), abs=1e-5)
    assert ssim(a, b, "skimage") == pytest.approx(structural_similarity(a, b, data_range=1.0), abs=1e-5)
    assert ssim(a, b) != pytest.approx(ssim(a, b, "skimage"), abs=1e-4)


def test_psnr_and_l1_by_hand():
    a, b = np.zeros((4, 4), np.float32), np.full((4, 4), 0.1, np.float32)
    assert psnr(a, b) == pytest.approx(20, abs=1e-5)
    assert l1(a, b) == pytest.approx(0.1)


@pytest.mark.parametrize("measure", [ssim, ms_ssim])
def test_too_small_images_are_refused(measure):
    with pytest.raises(ValueError, match="at least 11 pixels a side, got 20x10"):
        measure(np.zeros((10, 20)), np.zeros((10, 20)))


@pytest.mark.parametrize("measure", [ssim, ms_ssim, psnr, l1])
def test_unequal_shapes_are_refused(measure):
    with pytest.raises(ValueError, match="one shape"):
        measure(np.zeros((64, 64)), np.zeros((64, 65)))
