"""Brixia zones: their position, and the agreement of maps with readers' scores."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from diffva_ray.metrics.zones import zone_agreement, zone_energy, zone_masks


def lungs(size: int = 64) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    mask[6:54, 8:26] = True  # image left: the patient's right
    mask[10:46, 38:56] = True
    return mask


def test_zones_are_thirds_of_each_lung_from_the_patients_right() -> None:
    zones = zone_masks(lungs(), 64)
    assert (zones.sum(axis=0) == lungs()).all()  # each pixel of a lung in one zone
    rows = [np.flatnonzero(zone.any(axis=1)) for zone in zones]
    assert [(row[0], row[-1] + 1) for row in rows] == [(6, 22), (22, 38), (38, 54), (10, 22), (22, 34), (34, 46)]
    for zone, left in zip(zones, (True, True, True, False, False, False)):
        assert bool(np.flatnonzero(zone.any(axis=0)).max() < 32) is left
    bare = zone_masks(None, 64)
    assert bare.any(axis=(1, 2)).all()
    assert bare.sum(axis=0).max() == 1


def test_lungs_and_zones_of_another_grid_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lungs are \[32, 32\], got \(64, 64\)"):
        zone_masks(lungs(), 32)
    with pytest.raises(ValueError, match="zones are"):
        zone_energy(np.zeros((1, 64), np.float32), zone_masks(lungs(), 64))


def test_a_map_of_the_truth_agrees_and_one_of_the_other_side_does_not() -> None:
    random = np.random.default_rng(0)
    zones = zone_masks(lungs(), 64)
    scores = random.integers(0, 4, (30, 6)).astype(float)
    maps = [sum(score * zone for score, zone in zip(image, zones)) for image in scores]
    exact = np.stack([zone_energy(m.astype(np.float32), zones) for m in maps])
    np.testing.assert_allclose(exact, scores)
    noisy = exact + random.normal(0, 1, exact.shape)
    result = zone_agreement(noisy, scores, draws=200)
    assert result.pooled == pytest.approx(spearmanr(noisy.ravel(), scores.ravel())[0], rel=1e-9)
    assert result.interval[0] < result.pooled < result.interval[1]
    assert result.within > 0.5
    perfect = zone_agreement(exact, scores, draws=20)
    assert (perfect.pooled, perfect.n, perfect.n_within) == (pytest.approx(1), 30, 30)
    swapped = zone_agreement(exact[:, [3, 4, 5, 0, 1, 2]], scores, draws=20)  # left for right
    assert abs(swapped.within) < 0.3


def test_severity_of_whole_images_is_not_agreement_within_them() -> None:
    severity = np.repeat(np.arange(10.0)[:, None], 6, axis=1)
    scores = np.minimum(severity / 3, 3) + np.tile([0, 0.1, 0, 0.1, 0, 0.1], (10, 1))
    result = zone_agreement(severity + np.tile([0.1, 0, 0.1, 0, 0.1, 0], (10, 1)), scores)
    assert result.pooled > 0.8
    assert result.within < -0.9
    flat = zone_agreement(np.ones((3, 6)), scores[:3])
    assert np.isnan(flat.pooled)
    assert flat.n_within == 0
    with pytest.raises(ValueError, match="are \\[N, 6\\]"):
        zone_agreement(np.ones((3, 6)), np.ones((2, 6)))
