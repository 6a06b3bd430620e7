"""Attribution maps, and their agreement over seeds."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from diffva_ray.config.recipe import GenerateConfig
from diffva_ray.counterfactual.attribution import attribution, over_seeds


def test_mean_spread_and_significance_are_the_t_tests() -> None:
    generator = np.random.default_rng(0)
    maps = generator.normal(0, 0.1, (6, 40, 50)).astype(np.float32)
    maps[:, 10:20, 10:20] += 0.5
    agreement = over_seeds(maps, level=0.01)
    reference = ttest_1samp(maps.astype(np.float64), 0)
    assert agreement.mean == pytest.approx(maps.mean(axis=0), abs=1e-6)
    assert agreement.t == pytest.approx(reference.statistic, rel=1e-5)
    assert agreement.deviation == pytest.approx(maps.std(axis=0, ddof=1), rel=1e-4)
    assert np.array_equal(agreement.significant, reference.pvalue < 0.01)
    lesion = np.zeros((40, 50), bool)
    lesion[10:20, 10:20] = True
    assert agreement.significant[lesion].mean() > 0.95
    assert agreement.significant[~lesion].mean() == pytest.approx(0.01, abs=0.007)


def test_seeds_that_agree_to_the_bit() -> None:
    maps = np.zeros((3, 2, 2), np.float32)
    maps[:, 0, 0], maps[:, 1, 1] = 0.25, -0.5
    agreement = over_seeds(maps)
    assert agreement.significant.tolist() == [[True, False], [False, True]]
    assert agreement.t[0, 0] == np.inf
    assert agreement.t[1, 1] == -np.inf
    assert not np.isnan(agreement.t).any()


@pytest.mark.parametrize("shape", [(1, 4, 4), (4, 4)])
def test_one_seed_has_no_spread(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        over_seeds(np.zeros(shape, np.float32))


@pytest.mark.parametrize("shapes", [((4, 1), (4, 4), (4, 4)), ((4, 4), (4, 4), (1, 4)), ((1, 4, 4),) * 3])
def test_images_of_unequal_shapes_are_refused_and_not_broadcast(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"\[H, W\] of one shape"):
        attribution(*(np.zeros(shape, np.float32) for shape in shapes), GenerateConfig())
