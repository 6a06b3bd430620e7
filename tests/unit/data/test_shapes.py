"""Outlined lesions are drawn where they were outlined, on images of any size."""

from __future__ import annotations

import numpy as np
import pytest

from diffva_ray.data.shapes import Box, Polygon, Runs, Shape, coco_counts, lesion_mask


def test_masks_of_coco() -> None:
    assert coco_counts("PVWX6") == (2320 * 2828,)  # two empty masks of CheXlocalize's sample
    assert coco_counts("nefl3") == (2022 * 2021,)
    mask = Runs(counts=coco_counts("13410")).mask(3, 4)
    assert mask.T.ravel().astype(int).tolist() == [0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1]
    for text in ("~", "P", "1O"):  # no character of a mask, an unfinished number, a negative one
        with pytest.raises(ValueError, match="COCO mask"):
            coco_counts(text)


def test_shapes_are_scaled_to_the_image_file() -> None:
    box = Box("", 100, 50, 20, 10, 40, 20)
    for width, height in ((200, 100), (100, 50), (50, 25)):  # the file may be a copy of another size
        drawn = box.on_square(width, height, 50)
        assert (np.argwhere(drawn).min(0).tolist(), drawn.sum()) == ([10, 10], 20 * 20)
    triangle = Polygon("", 40, 40, ((0, 0), (39, 0), (0, 39))).on_square(80, 80, 20)
    assert triangle[2, 2]
    assert not triangle[18, 18]
    assert abs(triangle.mean() - 0.5) < 0.05


@pytest.mark.parametrize(
    "shape", [Box("", 0, 0, -5, -5, 7, 7), Box("", 0, 0, 9, 9, 100, 100), Box("", 0, 0, 3, 3, 0.1, 0.1)]
)
def test_a_box_is_cut_at_the_edges_and_never_empty(shape: Shape) -> None:
    assert 1 <= shape.on_square(10, 10, 10).sum() <= 9


def boxes(width: int, height: int, size: int, *each: tuple[float, float, float, float]) -> np.ndarray:
    mask = lesion_mask([Box(x=x, y=y, w=w, h=h) for x, y, w, h in each], width, height, size)
    assert mask is not None
    return mask


def test_boxes_are_squashed_with_the_image() -> None:
    mask = boxes(400, 100, 8, (100, 50, 200, 25))  # a pixel is 50 x 12.5
    expected = np.zeros((8, 8), bool)
    expected[4:6, 2:6] = True
    np.testing.assert_array_equal(mask, expected)
    random = np.random.default_rng(0)
    for x, y, w, h in random.uniform(50, 400, (20, 4)):
        assert boxes(1000, 800, 500, (x, y, w, h)).mean() == pytest.approx(w * h / 800_000, rel=0.05)


def test_boxes_that_are_thin_or_outside() -> None:
    thin = boxes(100, 100, 10, (10.2, 10.2, 0.1, 0.1))
    assert thin.sum() == 1
    assert thin[1, 1]
    assert not boxes(100, 100, 10, (200, 0, 10, 10), (-50, 0, 10, 10), (-9, 0, 0.5, 10)).any()
    assert boxes(100, 100, 10, (-50, -50, 500, 500)).all()
    assert boxes(100, 100, 10, (0, 0, 10, 10), (90, 90, 10, 10)).sum() == 2


def test_a_mask_too_small_for_the_square_keeps_a_pixel() -> None:
    drawn = Runs("", 1024, 1024, counts=(100 * 1024 + 500, 2, 1022, 2)).on_square(64, 64, 32)
    assert np.argwhere(drawn).tolist() == [[15, 3]]


def test_all_shapes_make_one_lesion() -> None:
    one, two = Box("", 0, 0, 0, 0, 2, 2), Box("", 0, 0, 6, 6, 2, 2)
    union = lesion_mask([one, two], 8, 8, 8)
    assert union is not None
    assert union.sum() == 8
    assert lesion_mask([], 8, 8, 8) is None
