"""FID-infinity on a Gaussian oracle; split halves of copies; the distance within classes."""

import numpy as np
import pytest

from diffva_ray.metrics.fid import frechet_distance_features
from diffva_ray.metrics.fid_controls import conditional, infinity, split_halves


def gaussians(n, d=16, seed=0, shift=0.5):
    random = np.random.default_rng(seed)
    x, y = random.standard_normal((2, n, d)) * np.arange(1, d + 1) ** -0.5
    y[:, 0] += shift
    return x, y


def test_infinity_removes_the_bias():
    """Truth 0.25: over 12 samples the mean error of the extrapolation is far smaller than the plain bias."""
    plain, far = [], []
    for seed in range(12):
        x, y = gaussians(200, seed=seed)
        plain.append(frechet_distance_features(x, y) - 0.25)
        far.append(infinity(x, y, seed=seed).value - 0.25)
    assert np.mean(plain) > 0.03
    assert abs(np.mean(far)) < 0.3 * np.mean(plain)


def test_infinity_reports_whether_it_can_be_trusted():
    x, y = gaussians(200)
    result = infinity(x, y)
    assert result.trusted
    assert 0 < result.error < 0.2
    assert 0 < result.r_squared <= 1
    assert result == infinity(x, y)
    assert not infinity(x[:30], y[:30]).trusted  # 15 rows are fewer than 16 dimensions
    with pytest.raises(ValueError, match="at least 8"):
        infinity(x[:7], y)


def test_split_halves_show_the_likeness_of_images_and_their_own_edits():
    """Copies have distance 0 from their own images, and that of two samples from the other half."""
    x, _ = gaussians(100)
    result = split_halves(x, x)
    assert result.n == 50
    assert result.own < 1e-9
    assert result.crossed > 0.05
    noise, other = gaussians(100, seed=9)
    independent = split_halves(noise, other)
    assert independent.crossed == pytest.approx(independent.own, rel=0.5)
    with pytest.raises(ValueError, match="one shape"):
        split_halves(x, x[:-1])


def test_conditional_shows_what_pooling_hides():
    """Two classes with exchanged counterfactuals: equal when pooled, far apart within each class."""
    random = np.random.default_rng(0)
    a, b = random.standard_normal((50, 3)), random.standard_normal((150, 3)) + 5
    exchanged = {"a": (a, b), "b": (b, a)}
    pooled = frechet_distance_features(np.vstack([a, b]), np.vstack([b, a]))
    assert pooled < 1e-9
    value = conditional(exchanged)
    assert value == pytest.approx(frechet_distance_features(a, b), rel=1e-9)
    assert value > 50
    mixed = conditional({"a": (a, a), "b": (b, a)})
    assert mixed == pytest.approx(0.5 * frechet_distance_features(b, a), rel=1e-9)  # 50 rows of a under both
    with pytest.raises(ValueError, match="no condition"):
        conditional({})
