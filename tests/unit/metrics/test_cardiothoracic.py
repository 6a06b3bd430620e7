"""The cardiothoracic ratio of synthetic lungs, of phantoms' true lungs, and of lungs segmented from their images."""

from __future__ import annotations

import numpy as np
import pytest

from diffva_ray.data.lungs import find_lungs
from diffva_ray.data.phantoms import phantom
from diffva_ray.data.thorax import Thorax, grid
from diffva_ray.metrics.cardiothoracic import cardiothoracic_ratio


def synthetic_lungs(heart: int) -> np.ndarray:
    """Lungs from column 10 to 90 with 6 columns between them, and a heart ``heart`` columns wide in the lower half, a
    third of it on image left."""
    mask = np.zeros((100, 100), bool)
    mask[10:80, 10:47] = mask[10:80, 53:90] = True
    mask[50:68, 50 - heart // 3 : 50 + heart - heart // 3] = False
    return mask


@pytest.mark.parametrize("heart", [24, 36, 48])
def test_a_synthetic_heart_over_a_synthetic_thorax(heart: int) -> None:
    assert cardiothoracic_ratio(synthetic_lungs(heart)) == pytest.approx(heart / 80)


def test_none_without_two_lungs() -> None:
    one = synthetic_lungs(24)
    one[:, 50:] = False
    assert cardiothoracic_ratio(one) is None
    assert cardiothoracic_ratio(np.zeros((50, 50), bool)) is None


def test_true_and_segmented_lungs_of_phantoms_show_the_enlarged_heart() -> None:
    """Segmented lungs are smooth and give about 0.05 less, but every patient's heart grows."""
    true, segmented = [], []
    for patient in range(12):
        sample = phantom("Cardiomegaly", patient, 9, 64)
        anatomy = np.random.SeedSequence([9, patient]).spawn(4)[0]
        thorax = Thorax.sample(np.random.default_rng(anatomy))
        u, v = thorax.coordinates(*grid(64))
        scales = 1.0, float(sample.factors["heart_scale"])  # type: ignore[arg-type]
        true.append([cardiothoracic_ratio(thorax.lungs(u, v, 1 / 64, scale) > 0.5) for scale in scales])
        segmented.append([cardiothoracic_ratio(find_lungs(image)) for image in (sample.ground_truth, sample.image)])  # type: ignore[arg-type]
    (healthy, ill), (before, after) = np.array(true, float).T, np.array(segmented, float).T
    assert (ill > healthy).all()
    assert (after > before).all()
    assert 0.4 < healthy.mean() < 0.5 < ill.mean()
    assert np.abs(before - healthy).mean() < 0.06
    assert np.abs(after - ill).mean() < 0.1
