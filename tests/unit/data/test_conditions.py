"""Condition images of a ControlNet: the lungs, and the edges outside them."""

from __future__ import annotations

import numpy as np
import pytest

from diffva_ray.data.conditions import condition
from diffva_ray.data.phantoms import phantom


def test_lungs_are_the_mask_and_edges_are_outside() -> None:
    normal = phantom("Normal", 0, seed=1, size=64)
    image = condition(normal.image, normal.lungs, ("lungs", "edges"))
    assert image.shape == (3, 64, 64)
    assert set(np.unique(image)) == {0.0, 1.0}
    assert np.array_equal(image[0] > 0, normal.lungs)
    assert image[1].any()
    assert not (image[1].astype(bool) & normal.lungs).any()
    assert not image[2].any()


def test_a_lesion_in_the_lungs_does_not_show() -> None:
    """The condition of an image with a lesion equals that of its ground-truth counterfactual."""
    ill = phantom("Lung_Opacity", 3, seed=1, size=64)
    assert np.abs(ill.image - ill.ground_truth)[ill.lungs].max() > 0.1
    both = [condition(image, ill.lungs, ("lungs", "edges")) for image in (ill.image, ill.ground_truth)]
    assert (both[0] != both[1]).mean() < 0.01


@pytest.mark.parametrize(("kinds", "channel"), [(("lungs",), 1), (("edges",), 0)])
def test_a_kind_left_out_stays_empty(kinds: tuple[str, ...], channel: int) -> None:
    normal = phantom("Normal", 0, seed=1, size=64)
    assert not condition(normal.image, normal.lungs, kinds)[channel].any()


@pytest.mark.parametrize("mask", [None, np.ones((64, 64), bool)], ids=["no mask", "the engine's mask of everything"])
def test_without_a_mask_lungs_are_found(mask: np.ndarray | None) -> None:
    normal = phantom("Normal", 0, seed=1, size=64)
    lungs = condition(normal.image, mask, ("lungs",))[0].astype(bool)
    assert (lungs & normal.lungs).sum() / (lungs | normal.lungs).sum() > 0.5


def test_an_image_without_lungs_is_no_error() -> None:
    assert not condition(np.zeros((64, 64), np.float32), None, ("lungs", "edges")).any()
