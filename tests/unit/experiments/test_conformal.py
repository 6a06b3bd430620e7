"""The guarantee of the conformal threshold, by hand and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from conformal import attributed, conformal_threshold


def test_by_hand() -> None:
    """Of 19 images of 4 pixels at level 0.1, the mean share may be 0.1 - 0.9 / 19 = 0.0526: 4 pixels of 76."""
    maps = [np.array([[0.0, 0.1], [0.2, image / 100]], np.float32) for image in range(50, 69)]
    threshold = conformal_threshold(maps, [None] * 19, level=0.1)
    assert threshold == pytest.approx(0.64)  # 0.65 to 0.68 are the four
    assert np.mean([attributed(saliency, None, threshold) for saliency in maps]) == pytest.approx(4 / 76)


def test_pixels_outside_the_region_do_not_count() -> None:
    region = np.array([[True, False], [True, True]])
    maps = [np.array([[0.1, 9.0], [0.2, 0.3]], np.float32)] * 40
    assert conformal_threshold(maps, [region] * 40, level=0.05) == pytest.approx(0.3)


def test_the_guarantee_holds_on_new_healthy_images() -> None:
    """Images differ in their noise level, so pixels of an image are far from independent."""
    random = np.random.default_rng(0)

    def images(n: int) -> list[np.ndarray]:
        return [(random.gamma(2.0) * random.standard_normal((16, 16))).clip(0).astype(np.float32) for _ in range(n)]

    shares = []
    for _ in range(200):
        threshold = conformal_threshold(images(40), [None] * 40, level=0.05)
        shares += [attributed(image, None, threshold) for image in images(10)]
    assert np.mean(shares) <= 0.05
    assert np.mean(shares) > 0.02  # the guarantee is not trivially met


def test_too_few_images_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"18 healthy images are too few .*; at least 19 are needed"):
        conformal_threshold([np.zeros((2, 2), np.float32)] * 18, [None] * 18)


def test_a_region_without_a_pixel_is_an_error() -> None:
    """A lung mask of zeros."""
    maps, empty = [np.zeros((2, 2), np.float32)] * 19, np.zeros((2, 2), bool)
    with pytest.raises(ValueError, match="region has no pixel"):
        conformal_threshold(maps, [None] * 18 + [empty], level=0.1)
    with pytest.raises(ValueError, match="region has no pixel"):
        attributed(maps[0], empty, 0.5)
