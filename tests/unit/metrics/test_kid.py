"""KID: unbiased, positive for a shift, with a correct standard error."""

import numpy as np
import pytest

from diffva_ray.metrics.kid import kid


def pair(n1: int, n2: int, shift: float, seed: int, d: int = 8) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.standard_normal((n1, d)), random.standard_normal((n2, d)) + np.eye(d)[0] * shift


def test_equals_the_definition():
    x, y = pair(6, 6, 0.5, 0)

    def k(a, b):
        return (a @ b / 8 + 1) ** 3

    within = [np.mean([k(z[i], z[j]) for i in range(6) for j in range(6) if i != j]) for z in (x, y)]
    between = np.mean([k(a, b) for a in x for b in y])
    value, error = kid(x.astype(np.float32), y.astype(np.float32))
    assert value == pytest.approx(sum(within) - 2 * between, rel=1e-4)

    without = [[kid_of(np.delete(x, i, 0), y) for i in range(6)], [kid_of(x, np.delete(y, i, 0)) for i in range(6)]]
    assert error == pytest.approx(np.sqrt(sum(5 * np.var(values) for values in without)), rel=1e-4)


def kid_of(x: np.ndarray, y: np.ndarray) -> float:
    """The full unbiased estimate, also for N1 different from N2."""
    gram = [(a @ b.T / 8 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    off = [(g.sum() - np.trace(g)) / (len(g) * (len(g) - 1)) for g in gram[:2]]
    return sum(off) - 2 * gram[2].mean()


@pytest.mark.parametrize(("n1", "n2", "size"), [(60, 60, 1000), (90, 60, 1000), (90, 80, 40)])
def test_unbiased_and_its_error_is_right(n1, n2, size):
    """Over many pairs of sets the mean value is the truth, and the mean error is the spread of the values."""
    for shift, truth in ((0.0, 0.0), (1.0, oracle(1.0))):
        values, errors = np.array(
            [kid(*pair(n1, n2, shift, seed), subsets=8, subset_size=size) for seed in range(200)]
        ).T
        assert values.mean() == pytest.approx(truth, abs=4 * values.std() / np.sqrt(200))
        assert 0.8 < errors.mean() / values.std() < 1.6
    assert values.mean() > 3 * values.std() / np.sqrt(200)


def oracle(shift: float, d: int = 8) -> float:
    """MMD^2 of N(0, I) and N(shift e1, I) under (x.y/d + 1)^3, from the first three moments of x.y."""

    def mean_kernel(a: float, b: float) -> float:  # shifts of x and y along the first axis
        first = a * b
        second = (1 + a * a) * (1 + b * b) + (d - 1)
        third = (a**3 + 3 * a) * (b**3 + 3 * b) + 3 * a * b * (d - 1)
        return third / d**3 + 3 * second / d**2 + 3 * first / d + 1

    return mean_kernel(0, 0) + mean_kernel(shift, shift) - 2 * mean_kernel(0, shift)


def test_same_distribution_is_negative_as_often_as_positive():
    values = [kid(*pair(50, 50, 0.0, seed))[0] for seed in range(60)]
    assert min(values) < 0 < max(values)


def test_seeded():
    x, y = pair(100, 90, 0.5, 0)
    assert kid(x, y, 5, 30, seed=1) == kid(x, y, 5, 30, seed=1)
    assert kid(x, y, 5, 30, seed=1) != kid(x, y, 5, 30, seed=2)


def test_too_few_rows_and_other_dimensions_are_refused():
    with pytest.raises(ValueError, match="at least 3 images in each set and 2 subsets, got 2 and 100"):
        kid(*pair(10, 2, 0.0, 0))
    with pytest.raises(ValueError, match="one d"):
        kid(np.zeros((10, 3)), np.zeros((10, 4)))
