"""Feature sets on disk: metrics equal those of arrays, for any block size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffva_ray.metrics import feature_set, fid, fid_controls, manifold
from diffva_ray.metrics.feature_set import FeatureSet
from diffva_ray.metrics.fid import Moments, delete_group_jackknife, frechet_distance_features, matched
from diffva_ray.metrics.fid_controls import infinity, split_halves
from diffva_ray.metrics.kid import kid
from diffva_ray.metrics.manifold import prdc
from diffva_ray.metrics.realism import directions, interpolation, verisimilitude


@pytest.fixture
def matrix(tmp_path: Path) -> np.memmap:
    rows = np.random.default_rng(3).standard_normal((300, 6)).astype(np.float32)
    np.save(tmp_path / "features.npy", rows)
    return np.load(tmp_path / "features.npy", mmap_mode="r")


@pytest.fixture
def sets(matrix: np.memmap) -> tuple[FeatureSet, FeatureSet, np.ndarray, np.ndarray]:
    """Interleaved rows of one matrix on disk, and the same rows as arrays."""
    first, second = np.arange(0, 300, 2), np.arange(1, 300, 2)[:120]
    return FeatureSet(matrix, first), FeatureSet(matrix, second), np.array(matrix[first]), np.array(matrix[second])


def test_rows_are_those_of_the_matrix(matrix: np.memmap) -> None:
    chosen = FeatureSet(matrix).take(np.array([5, 3, 9])).take(np.array([True, False, True]))
    np.testing.assert_array_equal(chosen.load(), matrix[[5, 9]])
    assert (len(chosen), chosen.dimension) == (2, 6)
    assert FeatureSet.of(chosen) is chosen
    sampled = FeatureSet(matrix).sampled(7, np.random.default_rng(0))
    assert len(set(sampled.rows)) == 7
    assert chosen.sampled(7, np.random.default_rng(0)) is chosen
    both = FeatureSet.together([chosen, sampled])
    assert both.base is matrix
    np.testing.assert_array_equal(both.load(), np.concatenate([chosen.load(), sampled.load()]))
    np.testing.assert_array_equal(FeatureSet.together([chosen, FeatureSet(matrix[:1].copy())]).load()[-1], matrix[0])
    with pytest.raises(ValueError, match=r"\[N, d\]"):
        FeatureSet(matrix[0])


def test_metrics_do_not_depend_on_storage_and_blocks(sets, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, a, b = sets
    whole = (
        frechet_distance_features(a, b), delete_group_jackknife(a, b), matched(a, b), kid(a, b, 5, 50), infinity(a, b),
        prdc(a, b), verisimilitude(b, a), interpolation(b, a), split_halves(a[:100], b[:100]),
        directions(a[:100], b[:100], a).tolist(),
    )  # fmt: skip
    monkeypatch.setattr(feature_set, "BLOCK", 7)
    small = x.take(np.arange(100)), y.take(np.arange(100))
    pieces = (
        frechet_distance_features(x, y), delete_group_jackknife(x, y), matched(x, y), kid(x, y, 5, 50), infinity(x, y),
        prdc(x, y), verisimilitude(y, x), interpolation(y, x), split_halves(*small), directions(*small, x).tolist(),
    )  # fmt: skip
    for one, other in zip(whole, pieces, strict=True):
        values = [list(each.__dict__.values()) if hasattr(each, "__dict__") else each for each in (one, other)]
        assert values[1] == pytest.approx(values[0], rel=1e-9)


def test_moments_merge_over_blocks(matrix: np.memmap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_set, "BLOCK", 11)
    moments = Moments.of(FeatureSet(matrix))
    np.testing.assert_allclose(moments.covariance, np.cov(matrix, rowvar=False, dtype=np.float64), rtol=1e-10)
    assert Moments.of(FeatureSet(matrix, np.zeros(0, int))).n == 0


def test_a_large_set_is_used_by_its_covariance(matrix: np.memmap, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = matrix[:4], matrix[4:]  # fewer rows than dimensions
    expected = frechet_distance_features(small, large)
    monkeypatch.setattr(fid, "MAX_DENSE_ROWS", 50)
    assert frechet_distance_features(small, large) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance_features(large, small) == pytest.approx(expected, rel=1e-6)


def test_large_sets_are_sampled_down(sets, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, *_ = sets
    monkeypatch.setattr(manifold, "MAX_ROWS", 40)
    monkeypatch.setattr(fid_controls, "MAX_ROWS", 60)
    result = prdc(x, y)
    assert (result.n1, result.n2) == (40, 40)
    assert result == prdc(x, y)  # seeded
    assert split_halves(x.take(np.arange(120)), y).n == 30
    assert infinity(x, y) == infinity(x, y)
