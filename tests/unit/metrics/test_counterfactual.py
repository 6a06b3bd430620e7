"""Scores of single counterfactuals, on images small enough to count by hand."""

import numpy as np
import pytest

from diffva_ray.metrics.counterfactual import (
    causal_pair,
    changed_share,
    cout,
    memorisation,
    outside_lesion,
    side_share,
)


def test_changed_share_counts_both_signs():
    m = np.zeros((4, 4))
    m[0, 0], m[1, 1], m[2, 2] = 0.2, -0.2, 0.05
    assert changed_share(m) == 2 / 16  # 0.05 is not above 0.05
    assert changed_share(m, 0.3) == 0


def test_outside_lesion_by_hand():
    m, lesion = np.zeros((2, 4)), np.zeros((2, 4), bool)
    lesion[0, 0] = True
    m[0, 0], m[1, 3] = -0.6, 0.2
    result = outside_lesion(m, lesion)
    assert (result.inside, result.change, result.share) == pytest.approx((0.6, 0.2 / 7, 0.25))
    assert np.isnan(outside_lesion(np.zeros((2, 4)), lesion).share)
    assert outside_lesion(m, np.zeros((2, 4), bool)) is None
    assert outside_lesion(m, np.ones((2, 4), bool)) is None
    with pytest.raises(ValueError, match="one shape"):
        outside_lesion(m, lesion[:1])


def test_the_patients_left_is_the_right_half_of_the_image():
    m = np.zeros((3, 4))
    m[:, 3] = -1.0
    assert side_share(m) == 1.0
    assert side_share(m[:, ::-1]) == 0.0
    assert side_share(np.ones((2, 5))) == pytest.approx(0.5)  # the middle column is half of either side
    assert np.isnan(side_share(np.zeros((2, 2))))


def test_cout_rewards_few_decisive_pixels():
    """A judge that reads one pixel: if that pixel changes most, the answer flips at the first step."""
    image, counterfactual = np.ones((5, 5)), np.ones((5, 5))
    counterfactual[2, 2] = 0.0
    healthy = lambda images: 1.0 - images[:, 2, 2]  # noqa: E731
    value, curve = cout(healthy, image, counterfactual, steps=25)
    assert curve.tolist() == [0.0] + [1.0] * 25
    assert value == pytest.approx(2 * (24.5 / 25) - 1)

    counterfactual = np.full((5, 5), 0.4)  # every other pixel changes more, so the decisive one comes last
    counterfactual[2, 2] = 0.5
    late, curve = cout(lambda images: (images[:, 2, 2] < 0.7).astype(float), image, counterfactual, steps=25)
    assert curve.tolist() == [0.0] * 25 + [1.0]
    assert late == pytest.approx(2 * (0.5 / 25) - 1)
    never, _ = cout(lambda images: np.zeros(len(images)), image, counterfactual)
    assert never == -1
    with pytest.raises(ValueError, match="one shape"):
        cout(healthy, image, counterfactual[:4])


def test_memorisation_finds_copies_and_only_them():
    random = np.random.default_rng(0)
    train, held, fresh = random.standard_normal((3, 300, 12))
    copied = memorisation(train[:100] + 0.01 * random.standard_normal((100, 12)), train, held)
    assert copied.nearer == 1.0
    assert copied.p_value == 0.001
    assert copied.train < 0.2 * copied.held_out
    independent = memorisation(fresh, train, held)
    assert independent.without_memory[0] < independent.nearer < independent.without_memory[1]
    assert independent.p_value > 0.05
    with pytest.raises(ValueError, match="two images"):
        memorisation(fresh, train, held[:1])


def test_memorisation_is_not_claimed_from_few_or_uneven_sets():
    """Six times as many training images are nearer by number alone, and eight images of each set by chance, which an
    interval over counterfactuals would miss. The test keeps its level: about one in twenty audits without memory."""
    random = np.random.default_rng(1)
    train, held, fresh = random.standard_normal((3, 300, 12))
    uneven = memorisation(fresh, train, held[:50])
    assert uneven.set_size == 50
    assert uneven.p_value > 0.05
    rejected = []
    for _ in range(60):
        counterfactuals, train, held = random.standard_normal((3, 60, 6))
        rejected.append(memorisation(counterfactuals, train[:8], held[:8], deals=99).p_value <= 0.05)
    assert np.mean(rejected) <= 0.15


def test_the_causal_pair_asks_for_a_region_that_alone_decides():
    """A judge that looks at one bright square: the map that shows it is right, one beside it or everywhere is not."""
    image = np.full((8, 8), 0.2, np.float32)
    image[2:4, 1:3] = 0.9
    counterfactual = np.full((8, 8), 0.2, np.float32)
    lesion = image > 0.5

    def healthy(images):
        return 1.0 - (images[:, 2:4, 1:3].mean(axis=(1, 2)) > 0.5)

    assert causal_pair(healthy, image, counterfactual, lesion) is True
    assert causal_pair(healthy, image, counterfactual, lesion[:, ::-1]) is False
    assert causal_pair(healthy, image, counterfactual, np.ones_like(lesion)) is True
    assert causal_pair(healthy, image, counterfactual, np.zeros_like(lesion)) is False
    assert causal_pair(healthy, counterfactual, counterfactual, lesion) is None  # nothing to explain
    # a judge that any change convinces: the region explains nothing
    counterfactual[7, 7] = 0.0
    assert causal_pair(lambda x: np.any(x != image, axis=(1, 2)) * 1.0, image, counterfactual, lesion) is False
    with pytest.raises(ValueError, match="one shape"):
        causal_pair(healthy, image, counterfactual, lesion[:4])
