"""The order of images: a function of the step alone, classes by weight, and no image twice before all came once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from diffva_ray.data.dataset import LabelledImage, UnusableData
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.mirroring import with_mirror_images
from diffva_ray.train.sampling import MAX_DRAWN_WHOLE, ImageOrder, ImageSet, RandomRows, step_generator

IMAGES = [LabelledImage(f"{label}/{n}.png", label) for label, count in (("a", 5), ("b", 3)) for n in range(count)]


def test_classes_come_by_weight_and_every_image_once_before_any_twice() -> None:
    order = ImageOrder(IMAGES, {"a": 2, "b": 1}, seed=0)
    labels = [IMAGES[order[position]].label for position in range(30)]
    assert Counter(labels) == {"a": 20, "b": 10}
    assert all(Counter(labels[start : start + 3]) == {"a": 2, "b": 1} for start in range(0, 30, 3))
    of_a = [order[position] for position in range(30) if labels[position] == "a"]
    assert [sorted(of_a[epoch * 5 : epoch * 5 + 5]) for epoch in range(4)] == [[0, 1, 2, 3, 4]] * 4
    assert of_a[:5] != of_a[5:10]


def test_the_order_has_no_state() -> None:
    order = ImageOrder(IMAGES, {}, seed=3)
    forward = [order[position] for position in range(40)]
    fresh = ImageOrder(IMAGES, {}, seed=3)
    assert [fresh[position] for position in reversed(range(40))] == forward[::-1]
    assert forward != [ImageOrder(IMAGES, {}, seed=4)[position] for position in range(40)]


def test_a_class_without_images_is_named() -> None:
    with pytest.raises(UnusableData, match="'c'"):
        ImageOrder(IMAGES, {"a": 1, "c": 1}, seed=0)


def test_each_step_has_its_own_noise() -> None:
    one, same, other = (torch.randn(3, generator=step_generator(0, "joint", step)) for step in (5, 5, 6))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("size", [MAX_DRAWN_WHOLE, MAX_DRAWN_WHOLE + 1, 2048])
def test_a_row_has_its_numbers_in_any_share(size: int) -> None:
    def drawn(rows: list[int]) -> list[torch.Tensor]:
        random = RandomRows(step_generator(0, "joint", 5), size, rows)
        return [random.normal(2, 3), random.normal(2, 3), random.uniform(), random.integers(1000), random.uniform(2)]

    rows = [0, 1, 7, size - 2, size - 1]
    together, alone = drawn(rows), [drawn([row]) for row in rows]
    for n, values in enumerate(together):
        assert torch.equal(values, torch.cat([one[n] for one in alone]))
        assert len({str(value.tolist()) for value in values}) == len(rows)  # each row has its own
    assert not torch.equal(together[0], together[1])


def test_the_work_of_a_worker_does_not_grow_with_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    randn, drawn = torch.randn, []

    def counted(*shape: int, **options: object) -> torch.Tensor:
        drawn.append(int(np.prod(shape)))
        return randn(*shape, **options)

    monkeypatch.setattr(torch, "randn", counted)
    for workers in (64, 256):
        drawn.clear()
        RandomRows(step_generator(0, "joint", 5), 32 * workers, range(64, 96)).normal(4, 8, 8)
        assert sum(drawn) == 32 * 4 * 8 * 8


def test_unreadable_images_are_left_out_and_recorded(images: Path, tmp_path: Path) -> None:
    for image in open_dataset(images).images[:4]:
        target = tmp_path / image.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((images / image.path).read_bytes())
    broken = tmp_path / open_dataset(tmp_path).images[1].path
    broken.write_bytes(b"not an image")
    for megabytes in (100, 0):  # in memory, and read when needed
        images_set = ImageSet(open_dataset(tmp_path), 32, megabytes)
        batch = images_set.batch(range(len(images_set.images)))
        assert batch.shape[1:] == (32, 32)
        assert np.isfinite(batch).all()
        assert list(images_set.unreadable) == [broken.relative_to(tmp_path).as_posix()]


def test_a_mirror_image_is_the_image_mirrored(images: Path) -> None:
    dataset = open_dataset(images)
    for megabytes in (0, 10):
        members = ImageSet(with_mirror_images(dataset), 32, megabytes)
        count = len(dataset.images)
        assert len(members.images) == 2 * count
        pixels = members.stack(range(2 * count))
        assert torch.equal(pixels[count:], pixels[:count].flip(2))
        assert not torch.equal(pixels[count:], pixels[:count])
