"""The Frechet distance against pytorch-fid and a Gaussian oracle; merging; the interval."""

import functools
import warnings

import numpy as np
import pytest
import scipy.linalg

from diffva_ray.metrics.fid import (
    Moments,
    delete_group_jackknife,
    frechet_distance,
    frechet_distance_features,
    matched,
)

SQRTM = scipy.linalg.sqrtm


def features(n: int, d: int = 64, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    """Correlated float32 features, mean ``shift`` away from 0 in every direction."""
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).standard_normal((d, d)) / np.sqrt(d) + np.diag(1 / np.arange(1, d + 1))
    return (random.standard_normal((n, d)) @ mixing + shift).astype(np.float32)


@pytest.fixture(params=["this SciPy", "SciPy without disp"])
def scipy_of(request, monkeypatch):
    """pytorch-fid calls ``sqrtm(disp=False)``, which SciPy 1.18 removes; the second case computes as it will then."""
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    if request.param == "SciPy without disp":
        monkeypatch.setattr(fid_score.linalg, "sqrtm", lambda a, disp=True: (SQRTM(a), 0.0))


def pytorch_fid(x: np.ndarray, y: np.ndarray) -> float:
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    statistics = [part for z in (x.astype(float), y.astype(float)) for part in (z.mean(0), np.cov(z, rowvar=False))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy on sqrtm(disp=...)
        try:
            return float(fid_score.calculate_frechet_distance(*statistics))
        except TypeError:
            pytest.skip("this SciPy no longer has what pytorch-fid calls")


@pytest.mark.parametrize(("n1", "n2"), [(500, 300), (2000, 2000), (40, 200), (200, 40), (40, 50)])
@pytest.mark.usefixtures("scipy_of")
def test_equals_pytorch_fid(n1, n2):
    x, y = features(n1), features(n2, seed=1, shift=0.2)
    expected = pytorch_fid(x, y)
    assert frechet_distance_features(x, y) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(expected, rel=1e-6)


def commuting_sets(n: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Two sets [n, d] in float64 with the known distance sum (a - b)^2, and the sum of their traces. The covariances
    are singular, of rank n - 1 < d, with the same axes, so that they commute."""
    random = np.random.default_rng(seed)
    axes = np.linalg.qr(random.standard_normal((d, d)))[0][:, : n - 1]
    centred = np.linalg.qr(np.column_stack([np.ones(n), random.standard_normal((n, n - 1))]))[0][:, 1:]
    a, b = np.arange(1, n) ** -0.5, np.arange(1, n) ** -0.5 * random.uniform(0.9, 1.1, n - 1)
    x, y = (np.sqrt(n - 1) * centred * spread @ axes.T for spread in (a, b))
    return x, y, float(np.sum((a - b) ** 2)), float(np.sum(a * a + b * b))


@pytest.mark.parametrize("n", [10, 30, 60])
@pytest.mark.usefixtures("scipy_of")
def test_singular_covariances_are_exact_here_and_not_in_sqrtm(n):
    """Below N = d pytorch-fid takes ``sqrtm`` of a singular product, whose rounding error is relative to the traces,
    not to the distance. The known distance shows that the difference is pytorch-fid's error."""
    x, y, truth, traces = commuting_sets(n, 64)
    theirs = abs(pytorch_fid(x, y) - truth) / traces
    ours = [abs(frechet_distance_features(x, y) - truth) / traces,
            abs(frechet_distance(Moments.of(x), Moments.of(y)) - truth) / traces]  # fmt: skip
    assert max(ours) < 1e-13
    assert 1e-10 < theirs < 1e-6


@pytest.mark.parametrize("cuts", [[], [1], [100], [7, 8, 250], list(range(1, 300))])
def test_merged_shards_equal_one_set(cuts):
    x, reference = features(300, shift=100.0), Moments.of(features(300, seed=1, shift=100.2))  # far off: sums cancel
    merged = functools.reduce(Moments.merge, [Moments.of(part) for part in np.split(x, cuts)])
    whole = Moments.of(x)
    assert merged.n == 300
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.covariance, whole.covariance, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(whole.covariance, np.cov(x.astype(float), rowvar=False), rtol=1e-9, atol=1e-9)
    assert frechet_distance(merged, reference) == pytest.approx(frechet_distance(whole, reference), rel=1e-9)


def test_merging_works_in_any_order_and_grouping():
    a, b, c = (Moments.of(features(n, seed=n)) for n in (10, 100, 33))
    left, right = a.merge(b).merge(c), c.merge(b.merge(a))
    np.testing.assert_allclose(left.scatter, right.scatter, rtol=1e-9, atol=1e-9)
    empty = Moments.of(np.zeros((0, 64)))
    assert empty.merge(empty).n == 0
    np.testing.assert_array_equal(a.merge(empty).scatter, a.scatter)
    np.testing.assert_array_equal(empty.merge(a).mean, a.mean)


def test_symmetric_and_zero_on_equal_sets():
    x, y = features(200), features(150, seed=1)
    for distance in (frechet_distance_features, lambda a, b: frechet_distance(Moments.of(a), Moments.of(b))):
        assert distance(x, y) == pytest.approx(distance(y, x), rel=1e-9)
        assert 0 <= distance(x, x) < 1e-9
        assert 0 <= distance(x[:20], x[:20]) < 1e-5


def test_constant_features_have_their_shift_only():
    """A collapsed generator has a covariance of zeros, which has no root to divide by."""
    x, y = np.zeros((10, 4)), np.ones((10, 4))
    assert frechet_distance_features(x, y) == 4
    assert frechet_distance(Moments.of(x), Moments.of(y)) == 4


def test_known_gaussians():
    """Diagonal covariances: ||m||^2 + sum (s1 - s2)^2."""
    mean, s1, s2 = np.array([1.0, -2.0, 0.0]), np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 1.0])
    a, b = Moments(11, np.zeros(3), 10 * np.diag(s1**2)), Moments(21, mean, 20 * np.diag(s2**2))
    assert frechet_distance(a, b) == pytest.approx(5 + 1 + 0 + 4)


@pytest.mark.parametrize("d", [8, 64])
def test_jackknife_covers_the_true_distance(d):
    """Gaussian oracle, truth 0.25, N = 150: the interval covers it though the plain value is far above."""
    random = np.random.default_rng(0)
    scale = np.arange(1, d + 1) ** -0.5
    covered, above = 0, 0
    for trial in range(40):
        x, y = random.standard_normal((2, 150, d)) * scale
        y[:, 0] += 0.5
        low, high = delete_group_jackknife(x, y, seed=trial)
        covered += low <= 0.25 <= high
        above += frechet_distance_features(x, y) > 0.25
    assert covered >= 32
    assert above >= 30


def test_the_paired_jackknife_has_a_narrower_interval():
    """An image and its counterfactual are sampled together."""
    x = features(200, d=8)
    y = x * np.float32(1.5)
    paired, unpaired = (delete_group_jackknife(x, y, paired=flag) for flag in (True, False))
    assert paired[1] - paired[0] < unpaired[1] - unpaired[0]
    assert delete_group_jackknife(x, y, seed=3) == delete_group_jackknife(x, y, seed=3)
    with pytest.raises(ValueError, match="one row per image each, got 200 and 199"):
        delete_group_jackknife(x, y[:-1], paired=True)


def test_jackknife_routes_agree():
    """Merging parts (N > d) and leaving out rows (N < d) differ in speed only, as groups of one row show."""
    x, y = features(12, d=4), features(12, d=4, seed=1)
    low, high = delete_group_jackknife(x, y, groups=12)
    wide_x, wide_y = (np.hstack([z, np.zeros((12, 20))]) for z in (x, y))  # zeros change the route only
    assert delete_group_jackknife(wide_x, wide_y, groups=12) == pytest.approx((low, high), rel=1e-6)


def test_matched_is_smaller_sets_on_both_sides():
    x, y = features(400), features(100, seed=1)
    mean, deviation = matched(x, y, draws=4, seed=1)
    assert mean > frechet_distance_features(x, y)  # fewer rows, more bias
    assert 0 < deviation < 0.2 * mean
    assert matched(x, y, draws=4, seed=1) == (mean, deviation)
    assert matched(x[:100], y) == (frechet_distance_features(x[:100], y), 0.0)
    assert matched(x, y, draws=4, n=50)[0] > mean
    with pytest.raises(ValueError, match="cannot be sampled down to 101"):
        matched(x, y, n=101)


@pytest.mark.parametrize(
    "measure",
    [
        frechet_distance_features,
        delete_group_jackknife,
        matched,
        lambda x, y: frechet_distance(Moments.of(x), Moments.of(y)),
    ],
)
def test_too_few_images_are_refused(measure):
    with pytest.raises(ValueError, match=r"needs at least \d images in each set here, got 1"):
        measure(features(10), features(1))


def test_other_dimensions_are_refused():
    with pytest.raises(ValueError, match="64 and 8 dimensions"):
        frechet_distance_features(features(10), features(10, d=8))
    with pytest.raises(ValueError, match="64 and 8 dimensions"):
        Moments.of(features(10)).merge(Moments.of(features(10, d=8)))
    with pytest.raises(ValueError, match="one row per image"):
        Moments.of(np.zeros(5))
