"""Outlined lesions are drawn where they were outlined, on images of any size."""

from __future__ import annotations

import numpy as np
import pytest

from diffva_ray.data.shapes import Box, Polygon, Runs, Shape, coco_counts, lesion


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
    assert (np.argwhere(box.resized(200, 100)).min(0).tolist(), box.resized(200, 100).sum()) == ([20, 40], 80 * 40)
    assert (np.argwhere(box.resized(50, 25)).min(0).tolist(), box.resized(50, 25).sum()) == ([5, 10], 20 * 10)
    triangle = Polygon("", 40, 40, ((0, 0), (39, 0), (0, 39))).resized(20, 20)
    assert triangle[2, 2]
    assert not triangle[18, 18]
    assert abs(triangle.mean() - 0.5) < 0.05


@pytest.mark.parametrize(
    "shape", [Box("", 0, 0, -5, -5, 7, 7), Box("", 0, 0, 9, 9, 100, 100), Box("", 0, 0, 3, 3, 0.1, 0.1)]
)
def test_a_box_is_cut_at_the_edges_and_never_empty(shape: Shape) -> None:
    assert 1 <= shape.resized(10, 10).sum() <= 9


def test_all_shapes_make_one_lesion() -> None:
    one, two = Box("", 0, 0, 0, 0, 2, 2), Box("", 0, 0, 6, 6, 2, 2)
    union = lesion([one, two], 8, 8)
    assert union is not None
    assert union.sum() == 8
    assert lesion([], 8, 8) is None
