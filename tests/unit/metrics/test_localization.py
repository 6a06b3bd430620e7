"""Localization scores against brute force, ties included; thresholds."""

import math

import numpy as np
import pytest

from diffva_ray.evaluate.records import Truth
from diffva_ray.evaluate.scores import score_image
from diffva_ray.metrics.localization import (
    THRESHOLDS,
    absolute,
    dice_at,
    fixed_threshold,
    positive,
    score,
    smooth,
)


def image(seed: int, side: int = 16, levels: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Saliency in [-1, 1] (few levels give many ties), truth and region, which overlap in part."""
    random = np.random.default_rng(seed)
    saliency = random.uniform(-1, 1, (side, side)).astype(np.float32)
    if levels:
        saliency = np.round(saliency * levels).astype(np.float32) / levels
    truth = random.random((side, side)) < 0.2
    saliency[truth] = np.minimum(saliency[truth] + 0.5, 1)
    return saliency, truth, random.random((side, side)) < 0.7


def dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    return 2 * (prediction & truth).sum() / (prediction.sum() + truth.sum())


CASES = [(seed, levels, masked) for seed in range(3) for levels in (None, 3, 40) for masked in (False, True)]


@pytest.mark.parametrize(("seed", "levels", "masked"), CASES)
def test_scores_equal_brute_force(seed, levels, masked):
    saliency, truth, region = image(seed, levels=levels)
    result = score(saliency, truth, region if masked else None)
    inside = region if masked else np.ones_like(truth)
    values, lesion = saliency[inside], truth[inside]

    pairs = [(a > b) + 0.5 * (a == b) for a in values[lesion] for b in values[~lesion]]
    assert result.auroc == pytest.approx(np.mean(pairs), abs=1e-12)

    levels_seen = sorted(set(values.tolist()), reverse=True)
    precision = [lesion[values >= v].mean() for v in levels_seen]
    recall = [0, *((values[lesion] >= v).mean() for v in levels_seen)]
    assert result.auprc == pytest.approx(np.dot(np.diff(recall), precision), abs=1e-12)

    assert result.dice_best == pytest.approx(max(dice(values >= v, lesion) for v in levels_seen), abs=1e-12)
    ious = [((values >= v) & lesion).sum() / ((values >= v) | lesion).sum() for v in levels_seen]
    assert result.iou_best == pytest.approx(max(ious), abs=1e-12)
    assert result.pointing_game == pytest.approx(lesion[values == values.max()].mean())
    ratio = values[lesion & (values > 0)].sum() / values[values > 0].sum()
    assert result.energy_in_truth == pytest.approx(ratio, rel=1e-5)

    curve = [dice(values >= t, lesion) for t in THRESHOLDS]
    np.testing.assert_allclose(result.dice_curve, curve, rtol=1e-6)
    assert result.dice_curve.dtype == np.float32


def test_a_perfect_and_a_hopeless_map():
    _, truth, _ = image(0)
    perfect, inverted = score(truth.astype(float), truth), score(1.0 - truth, truth)
    assert (perfect.auroc, perfect.auprc, perfect.dice_best, perfect.iou_best) == (1, 1, 1, 1)
    assert (perfect.pointing_game, perfect.energy_in_truth) == (1, 1)
    assert (perfect.dice_curve == 1).all()
    assert (inverted.auroc, inverted.pointing_game, inverted.energy_in_truth) == (0, 0, 0)


def test_a_flat_map_scores_as_chance():
    _, truth, _ = image(0)
    flat = score(np.zeros_like(truth, dtype=float), truth)
    assert flat.auroc == 0.5
    assert flat.auprc == flat.pointing_game == pytest.approx(truth.mean())
    assert math.isnan(flat.energy_in_truth)
    assert (flat.dice_curve == 0).all()


def test_nothing_to_find_is_none():
    saliency, truth, region = image(0)
    assert score(saliency, np.zeros_like(truth)) is None
    assert score(saliency, np.ones_like(truth)) is None
    assert score(saliency, ~region, region) is None
    assert score(saliency, region | truth, region) is None
    assert score(saliency, truth, np.zeros_like(region)) is None


def test_bad_input_is_refused():
    saliency, truth, region = image(0)
    with pytest.raises(ValueError, match="one shape"):
        score(saliency, truth[:-1])
    with pytest.raises(ValueError, match="one shape"):
        score(saliency, truth, region[:, :-1])
    saliency[0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        score(saliency, truth)


def test_a_threshold_of_one_set_applies_to_another():
    curves = np.stack([score(*image(seed)[:2]).dice_curve for seed in range(8)])
    threshold, mean = fixed_threshold(curves)
    assert mean == pytest.approx(curves.mean(axis=0).max())
    assert dice_at(curves, threshold).mean() == pytest.approx(mean)
    assert dice_at(curves, round(threshold, 6)).mean() == pytest.approx(mean)  # as read from a table
    assert mean <= np.mean([score(*image(seed)[:2]).dice_best for seed in range(8)])
    other = score(*image(9)[:2])
    saliency, truth, _ = image(9)
    assert dice_at(other.dice_curve[None], threshold)[0] == pytest.approx(dice(saliency >= threshold, truth))


def test_thresholds_off_the_grid_are_refused():
    curves = np.zeros((2, len(THRESHOLDS)), np.float32)
    assert THRESHOLDS[-1] == 1
    assert len(THRESHOLDS) == 400
    assert THRESHOLDS[0] > 0
    for wrong in (0.0, 1.2, -1.0, float("nan")):
        with pytest.raises(ValueError, match="lies outside"):
            dice_at(curves, wrong)
    with pytest.raises(ValueError, match=r"\[N, 400\]"):
        fixed_threshold(curves[:, :10])
    with pytest.raises(ValueError, match="no image"):
        fixed_threshold(curves[:0])


def test_signs_and_smoothing():
    m = np.array([[-0.5, 0.25]])
    np.testing.assert_array_equal(positive(m), [[0, 0.25]])
    np.testing.assert_array_equal(absolute(m), [[0.5, 0.25]])
    spot = np.zeros((64, 64))
    spot[32, 32] = 1
    assert smooth(spot, 0) is spot
    blurred = smooth(spot, 0.05)
    assert blurred.sum() == pytest.approx(1)
    offsets = np.arange(64) - 32
    assert np.sqrt((blurred.sum(axis=0) * offsets**2).sum()) == pytest.approx(0.05 * 64, rel=0.02)
    np.testing.assert_allclose(smooth(np.full((8, 8), 0.3), 0.2), 0.3)  # reflected: no dark rim


def test_a_map_of_the_outside_of_the_lungs_gets_no_credit_for_lesions_there():
    """With lesion pixels outside the lungs in the region, every pixel scored there would be lesion."""
    lungs, lesion = np.zeros((2, 16, 16), bool)
    lungs[4:12, 4:12], lesion[10:14, 6:9] = True, True
    rows = {row["map"]: row for row in score_image({"outside": np.float32(~lungs)}, Truth(lesion, lungs))}
    assert rows["outside"]["auroc"] == 0.5
    assert rows["outside"]["lesion_in_region"] == 0.5
