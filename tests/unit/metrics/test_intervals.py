"""Intervals over groups: their coverage, simulated; groups are resampled whole; pairs narrow a difference."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest
from scipy.stats import t as student

from diffva_ray.metrics import intervals
from diffva_ray.metrics.intervals import group_bootstrap, paired_difference, proportion_interval


def simulated(kind: str, patients: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Scores and patients, with one to three images of each: skewed like AUROCs near 1 or AUPRCs, or hits of 0 and 1.

    Counts and scores are independent, so the mean over images is the mean over patients."""
    count = random.integers(1, 4, patients)
    level = {"auroc": 1 - random.beta(1, 6, patients), "auprc": random.beta(0.6, 1.2, patients),
             "hits": random.beta(2, 1, patients)}[kind]  # fmt: skip
    of_image = np.repeat(level, count)
    values = random.random(len(of_image)) < of_image if kind == "hits" else of_image
    return values.astype(float), np.repeat(np.arange(patients), count)


TRUTH = {"auroc": 6 / 7, "auprc": 1 / 3, "hits": 2 / 3}


@pytest.mark.parametrize("kind", list(TRUTH))
@pytest.mark.parametrize("patients", [10, 20, 61])
def test_the_interval_covers_the_truth_as_often_as_it_says(kind: str, patients: int) -> None:
    """400 samples: the coverage has an error of 0.011. Percentile intervals of 10 patients cover 0.87 to 0.90."""
    random, covered = np.random.default_rng(patients), 0
    for _ in range(400):
        values, groups = simulated(kind, patients, random)
        low, high = group_bootstrap(values, groups, draws=300)
        covered += low <= TRUTH[kind] <= high
    assert 0.915 <= covered / 400 <= 0.995


@pytest.mark.parametrize("hits", [0, 3, 19, 20])
def test_of_independent_hits_the_interval_is_wilsons(hits: int) -> None:
    """With n - 1 in the variance, as for groups: Wilson's with n - 1 values, but for shares of 0 and 1."""
    n = 20
    values = [1.0] * hits + [0.0] * (n - hits)
    low, high = proportion_interval([*values, float("nan")], range(n + 1))
    interior = 0 < hits < n
    wilson = binomtest(hits, n).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((wilson.low, wilson.high), abs=0.01 if interior else 1e-12)
    assert low < high
    # the same images twice are no further evidence
    assert proportion_interval(values * 2, [*range(n)] * 2) == pytest.approx((low, high))


@pytest.mark.parametrize("share", [0.66, 0.95])
@pytest.mark.parametrize("patients", [10, 61])
def test_the_interval_of_a_proportion_covers_it(share: float, patients: int) -> None:
    """Hits that are alike within a patient; a bootstrap has no interval where all are hits."""
    random, covered = np.random.default_rng(patients), 0
    for _ in range(400):
        count = random.integers(1, 4, patients)
        level = random.beta(4 * share, 4 * (1 - share), patients)
        values = (random.random(count.sum()) < np.repeat(level, count)).astype(float)
        low, high = proportion_interval(values, np.repeat(np.arange(patients), count))
        covered += low <= share <= high
    assert 0.915 <= covered / 400 <= 0.995


def test_an_interval_ends_where_the_mean_must() -> None:
    hits = [1.0] * 9 + [0.0]
    assert group_bootstrap(hits, range(10), within=(0, 1))[1] <= 1 < group_bootstrap(hits, range(10))[1]
    assert group_bootstrap([0.7] * 10, range(10)) == (0.7, 0.7)


def test_the_bootstrap_resamples_patients_not_images():
    """Ten patients of 20 equal images each: resampling images would claim sqrt(20) times the precision."""
    random = np.random.default_rng(0)
    per_patient = random.normal(size=10)
    values, patients = np.repeat(per_patient, 20), np.repeat([f"p{i}" for i in range(10)], 20)
    low, high = group_bootstrap(values, patients.tolist())
    expected = 2 * student.ppf(0.975, 9) * per_patient.std(ddof=1) / np.sqrt(10)
    assert low < per_patient.mean() < high
    assert high - low == pytest.approx(expected, rel=0.15)
    widening = np.sqrt(199 / 9) * student.ppf(0.975, 9) / student.ppf(0.975, 199)
    alone = group_bootstrap(values, list(range(200)))
    assert (high - low) / (alone[1] - alone[0]) == pytest.approx(widening, rel=0.15)
    assert group_bootstrap(values, patients.tolist()) == (low, high)


def test_the_normal_interval_of_many_patients_equals_the_bootstraps(monkeypatch):
    random = np.random.default_rng(1)
    patients = random.integers(0, 800, 3000)
    values = random.normal(size=800)[patients] + random.normal(size=3000)
    values[random.uniform(size=3000) < 0.1] = np.nan
    bootstrap = group_bootstrap(values, patients, draws=4000)
    monkeypatch.setattr(intervals, "MIN_NORMAL_GROUPS", 100)
    assert group_bootstrap(values, patients) == pytest.approx(bootstrap, abs=0.06 * (bootstrap[1] - bootstrap[0]))


def test_the_bootstrap_leaves_out_nan_and_needs_two_groups():
    values, groups = [0.1, float("nan"), 0.3, 0.5], ["a", "b", "b", "c"]
    assert group_bootstrap(values, groups) == group_bootstrap([0.1, 0.3, 0.5], ["a", "b", "c"])
    for too_few in (([], []), ([0.5, 0.6], ["a", "a"]), ([float("nan")] * 2, ["a", "b"])):
        assert all(math.isnan(end) for end in group_bootstrap(*too_few))
    with pytest.raises(ValueError, match="one group per value"):
        group_bootstrap([0.1, 0.2], ["a"])


def ones(values: np.ndarray) -> np.ndarray:
    return np.ones_like(values)


def test_pairing_narrows_the_interval_of_a_known_difference() -> None:
    random = np.random.default_rng(0)
    hardness = random.normal(0.7, 0.2, 300)
    values = np.stack([hardness, hardness + 0.05 + random.normal(0, 0.03, 300)], axis=1)
    in_a, in_b, (low, high) = paired_difference(values, ones(values), range(300))
    assert (in_a, in_b) == pytest.approx(tuple(values.mean(axis=0)))
    assert 0 < low < 0.05 < high
    _, _, (loose_low, loose_high) = paired_difference(
        np.stack([values[:, 0], random.permutation(values[:, 1])], axis=1), ones(values), range(300)
    )
    assert high - low < (loose_high - loose_low) / 4


def test_intervals_have_their_nominal_coverage() -> None:
    held = 0
    for seed in range(100):
        random = np.random.default_rng(seed)
        values = random.normal(0, 1, (60, 1)) + random.normal([0, 0.2], 0.5, (60, 2))
        _, _, (low, high) = paired_difference(values, ones(values), range(60), draws=200)
        held += low <= 0.2 <= high
    assert 88 <= held <= 100


def test_ratios_are_of_sums_and_images_are_resampled_whole() -> None:
    values = np.array([[1.0, 2.0], [3.0, 3.0], [2.0, 5.0]])
    weights = np.array([[2.0, 2.0], [6.0, 6.0], [2.0, 2.0]])
    assert paired_difference(values, weights, "abc")[:2] == pytest.approx((0.6, 1.0))
    random = np.random.default_rng(1)
    images = np.repeat(random.normal(0, 1, (40, 2)), 5, axis=0)  # five equal samples of each image
    narrow = paired_difference(images, ones(images), range(200))[2]
    wide = paired_difference(images, ones(images), np.repeat(range(40), 5).tolist())[2]
    assert wide[1] - wide[0] > 1.7 * (narrow[1] - narrow[0])
    assert np.isnan(paired_difference(values, weights, "aaa")[2]).all()
    with pytest.raises(ValueError, match="N groups"):
        paired_difference(values, weights, "ab")
