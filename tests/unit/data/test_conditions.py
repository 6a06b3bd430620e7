"""Condition images of a ControlNet: the lungs, and the edges outside them; a user's own."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from diffva_ray.data.conditions import condition, decode_condition
from diffva_ray.data.images import BadImage
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


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_a_users_own_image_keeps_its_colours_and_a_grey_one_has_three_channels() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (16, 12, 3), np.uint8)
    image = Image.fromarray(colours)
    expected = np.moveaxis(colours, -1, 0) / np.float32(255)
    for stored in (image, image.convert("RGBA")):
        found = decode_condition(png(stored.crop((0, 0, 12, 12))), 12, (12, 12))
        assert np.array_equal(found, expected[:, :12])
    labels = image.crop((0, 0, 12, 12)).quantize(4)  # a palette, as segmentations have
    found = decode_condition(png(labels), 12, (24, 24))
    assert np.array_equal(found, np.moveaxis(np.asarray(labels.convert("RGB")), -1, 0) / np.float32(255))
    depth = np.random.default_rng(1).integers(0, 65536, (12, 12), np.uint16)
    found = decode_condition(png(Image.fromarray(depth)), 12, (12, 12))
    assert np.allclose(found, np.stack([depth / 65535] * 3), atol=1e-6)


@pytest.mark.parametrize(("shape", "fits"), [((2500, 2000), True), ((2499, 2000), True), ((2000, 2500), False),
                                             ((2500, 1950), False)])  # fmt: skip
def test_its_proportions_are_those_of_the_x_ray(shape: tuple[int, int], fits: bool) -> None:
    data = png(Image.new("L", (102, 128), 90))  # 2500 x 2000, made smaller and rounded
    if fits:
        assert decode_condition(data, 16, shape).shape == (3, 16, 16)
        return
    with pytest.raises(BadImage, match=rf"102 x 128 pixels and its X-ray {shape[1]} x {shape[0]}: other proportions"):
        decode_condition(data, 16, shape)


@pytest.mark.parametrize("data", [b"", b"no image", png(Image.new("L", (9, 9)))[:50]])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(BadImage):
        decode_condition(data, 16, (9, 9))


def test_an_image_without_lungs_is_no_error() -> None:
    assert not condition(np.zeros((64, 64), np.float32), None, ("lungs", "edges")).any()
