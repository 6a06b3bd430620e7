"""Precision, recall, density and coverage on sets that can be counted by hand, and against a plain double loop."""

import numpy as np
import pytest

from diffva_ray.metrics.manifold import prdc, squared_distances


def test_by_hand_on_a_line():
    """k = 1: radii are 1 for every row of {0, 1, 2}; {0.4, 5} has one row inside, whose own ball reaches 4.6."""
    real, generated = np.array([[0.0], [1.0], [2.0]]), np.array([[0.4], [5.0]])
    result = prdc(real, generated, k=1)
    assert result.precision == 0.5
    assert result.density == 2 / 2  # 0.4 is in the balls around 0 and 1
    assert result.coverage == 2 / 3
    assert result.recall == 1.0


def plain(real, generated, k):
    """The definitions of Naeem 2020, one pair at a time."""
    distance = lambda a, b: float(np.linalg.norm(a - b))  # noqa: E731
    radius = [sorted(distance(a, b) for m, b in enumerate(real) if m != n)[k - 1] for n, a in enumerate(real)]
    own = [sorted(distance(a, b) for m, b in enumerate(generated) if m != n)[k - 1] for n, a in enumerate(generated)]
    inside = [[distance(r, g) < radius[n] for g in generated] for n, r in enumerate(real)]
    back = [any(distance(r, g) < own[m] for m, g in enumerate(generated)) for r in real]
    columns = list(zip(*inside))
    return (
        np.mean([any(column) for column in columns]),
        np.mean(back),
        sum(map(sum, inside)) / (k * len(generated)),
        np.mean([any(row) for row in inside]),
    )


@pytest.mark.parametrize(("k", "shift"), [(1, 0.0), (3, 0.5), (5, 2.0)])
def test_equals_the_definitions(k, shift):
    random = np.random.default_rng(k)
    real, generated = random.standard_normal((40, 3)), random.standard_normal((30, 3)) + shift
    result = prdc(real.astype(np.float32), generated.astype(np.float32), k)
    expected = plain(real.astype(np.float32), generated.astype(np.float32), k)
    assert (result.precision, result.recall, result.density, result.coverage) == pytest.approx(expected)


def test_blocks_change_nothing(monkeypatch):
    random = np.random.default_rng(0)
    x, y = random.standard_normal((2, 50, 4))
    whole = prdc(x, y)
    monkeypatch.setattr("diffva_ray.metrics.manifold.BLOCK", 7)
    assert prdc(x, y) == whole


def test_a_collapsed_and_a_distant_generator_are_distinguished():
    """A generator of one image is precise and covers nothing; one of distant images is neither."""
    random = np.random.default_rng(1)
    real = random.standard_normal((100, 5))
    collapsed = prdc(real, real[:1] + 0.001 * random.standard_normal((100, 5)))
    assert collapsed.precision > 0.95
    assert collapsed.recall < 0.05
    assert collapsed.coverage < 0.2
    far = prdc(real, real + 100)
    assert (far.precision, far.density, far.coverage) == (0, 0, 0)


def test_distances_and_refused_input():
    assert squared_distances(np.array([[0.0], [4.0]]), np.array([[1.0], [3.5]])).tolist() == [[1.0, 12.25], [9.0, 0.25]]
    assert squared_distances(np.full((1, 2), 1e8), np.full((1, 2), 1e8)) == 0
    with pytest.raises(ValueError, match="more than 5 images"):
        prdc(np.zeros((5, 2)), np.zeros((9, 2)))
    with pytest.raises(ValueError, match="one d"):
        prdc(np.zeros((9, 2)), np.zeros((9, 3)))
