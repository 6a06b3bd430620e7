"""Maps without a counterfactual, against their definitions."""

import numpy as np

from diffva_ray.metrics.baselines import NormalComponents, asymmetry, centre_prior, equalised, learned_prior

IMAGES = np.random.default_rng(0).random((40, 16, 16), np.float32)


def test_priors_do_not_depend_on_the_image() -> None:
    prior = centre_prior(9)
    assert prior[4, 4] == prior.max() == 1
    np.testing.assert_allclose(prior, prior[::-1, ::-1].T)
    masks = [np.eye(4, dtype=bool), np.zeros((4, 4), bool)]
    np.testing.assert_array_equal(learned_prior(masks), np.eye(4) / 2)


def test_asymmetry_is_what_one_side_has_more() -> None:
    image = np.zeros((4, 4), np.float32)
    image[1, 0] = 0.5
    assert asymmetry(image)[1].tolist() == [0.5, 0, 0, -0.5]


def test_residual_is_what_the_eigenvectors_of_the_covariance_leave() -> None:
    normals, others = IMAGES[:30], IMAGES[30:]
    fitted = NormalComponents.of(normals, 8)
    assert fitted.size == 16
    flat, mean = equalised(normals).reshape(30, -1), equalised(normals).reshape(30, -1).mean(0)
    vectors = np.linalg.eigh(np.cov(flat.T))[1][:, -5:]  # of the five largest eigenvalues
    centred = equalised(others).reshape(10, -1) - mean
    expected = centred - centred @ vectors @ vectors.T
    np.testing.assert_allclose(fitted.residual(others, 5).reshape(10, -1), expected, atol=1e-4)
    # a normal image that the components span has no residual
    assert np.abs(NormalComponents.of(normals, 30).residual(normals, 30)).max() < 1e-3


def test_exposure_does_not_change_the_residual() -> None:
    fitted = NormalComponents.of(IMAGES[:30], 8)
    dark = (IMAGES[30:] * 0.5 + 0.1).astype(np.float32)
    np.testing.assert_allclose(fitted.residual(dark, 5), fitted.residual(IMAGES[30:], 5), atol=1e-3)
