"""Counterfactuals against real images in feature space: copies, fakes, interpolated modes, direction of the edit."""

from __future__ import annotations

import numpy as np
import pytest

from diffva_ray.metrics.realism import directions, interpolation, verisimilitude


def normal(n: int, d: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d))


def test_samples_of_one_distribution_pass_half_the_time() -> None:
    result = verisimilitude(normal(300, seed=1), normal(400))
    assert result.taken == pytest.approx(0.5, abs=4 * result.error)
    assert result.n == 300


def test_blurred_and_copied_counterfactuals_are_recognised() -> None:
    healthy = normal(300)
    assert verisimilitude(0.2 * normal(300, seed=1) + 4, healthy).taken == 0
    assert verisimilitude(healthy + 1e-3 * normal(300, seed=1), healthy).taken == 1
    with pytest.raises(ValueError, match="2 images in each set, got 1"):
        verisimilitude(healthy[:1], healthy)


def two_modes(seed: int = 0) -> np.ndarray:
    """Two clouds of radius 1, 20 apart along the first axis."""
    cloud = normal(400, 3, seed)
    cloud[::2, 0] += 20
    return cloud


def test_samples_between_two_modes_are_found() -> None:
    """Mode interpolation: samples halfway between two modes, where no image is. Fresh images of the modes are not
    remote; samples equally far to the side of a mode are remote but not between two."""
    healthy = two_modes()
    halfway, beside = normal(100, 3, 2) * 0.3, normal(100, 3, 3) * 0.3
    halfway[:, 0] += 10
    beside[:, 1] += 10
    fresh = interpolation(two_modes(1), healthy)
    assert fresh.remote < 0.12
    assert fresh.between < 0.02
    result = interpolation(halfway, healthy)
    assert (result.remote, result.between) == (1, 1)
    assert result.ratio > 5 * fresh.ratio
    off = interpolation(beside, healthy)
    assert off.remote == 1
    assert off.between == 0
    one = healthy[1::2]  # without the second mode the same samples are beside the only one
    assert interpolation(halfway, one).remote == 1
    assert interpolation(halfway, one).between < 0.05
    with pytest.raises(ValueError, match="more than 6 healthy images"):
        interpolation(halfway, healthy[:6])


def test_direction_is_the_cosine_with_the_way_to_health() -> None:
    images, healthy = normal(200), normal(300, seed=1) + 3
    towards = directions(images, images + 1.0, healthy)
    assert towards.mean() > 0.98
    np.testing.assert_allclose(directions(images, images - 1.0, healthy), -towards, atol=1e-12)
    across = np.zeros_like(images)
    across[:, 0], across[:, 1] = 1, -1
    assert np.abs(directions(images, images + across, healthy)).mean() < 0.15
    assert np.isnan(directions(images, images, healthy)).all()


def test_an_images_own_noise_is_no_agreement() -> None:
    """Counterfactuals that are new samples of the class have no direction. If an image were not left out of its class,
    the mean would be far above 0 at small N."""
    values = [directions(normal(6, 50, seed), normal(6, 50, seed + 1000), normal(400, 50, 5000)).mean()
              for seed in range(40)]  # fmt: skip
    naive = []
    for seed in range(40):
        images, counterfactuals = normal(6, 50, seed), normal(6, 50, seed + 1000)
        way = normal(400, 50, 5000).mean(axis=0) - images.mean(axis=0)
        change = counterfactuals - images
        naive.append((change @ way / np.linalg.norm(change, axis=1) / np.linalg.norm(way)).mean())
    assert np.mean(naive) > 0.2
    assert abs(np.mean(values)) < 0.06
    with pytest.raises(ValueError, match="N >= 3"):
        directions(normal(2), normal(2), normal(5))
