"""Phantom v1 is frozen: its images, its difficulty and its ground truth."""

from __future__ import annotations

import json

import numpy as np
import pytest

from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.phantoms import ALL_CLASSES, CLASSES, VERSION, phantom, phantom_set
from diffva_ray.metrics.localization import score
from diffva_ray.metrics.ssim import psnr
from diffva_ray.storage.local import LocalStore

ABNORMAL = CLASSES[1:]


@pytest.fixture(scope="module")
def phantoms() -> dict[str, list]:
    return {label: [phantom(label, n, seed=2026) for n in range(60)] for label in ABNORMAL}


def test_v1_is_frozen() -> None:
    """Coarse grey levels of one image per class: equal with another libm, not with another anatomy, lesion or noise."""
    images = [phantom(label, 17, seed=4).image for label in ALL_CLASSES]
    means = np.array([image.reshape(4, 16, 4, 16).mean(axis=(1, 3)) for image in images])
    assert VERSION == "phantom v1"
    frozen = np.array([[int(level) for level in row.split()] for row in FROZEN]).reshape(means.shape)
    assert np.abs(means - frozen / 1000).max() < 2e-3


def test_brightness_alone_does_not_find_the_lesion(phantoms) -> None:
    by_class = {
        label: np.mean([result.auroc for p in group if (result := score(p.image, p.lesion, p.lungs | p.lesion))])
        for label, group in phantoms.items()
    }
    assert np.mean(list(by_class.values())) <= 0.75
    assert max(by_class.values()) <= 0.78


def test_image_and_ground_truth_differ_as_much_as_planned(phantoms) -> None:
    distances = [psnr(p.image, p.ground_truth) for group in phantoms.values() for p in group]
    assert 29 <= np.mean(distances) <= 31.5


@pytest.mark.parametrize(("label", "area"), [("Lung_Opacity", 0.03), ("COVID", 0.04), ("Viral Pneumonia", 0.12)])
def test_lesion_areas(phantoms, label: str, area: float) -> None:
    assert np.mean([p.lesion.mean() for p in phantoms[label]]) == pytest.approx(area, rel=0.25)


@pytest.mark.parametrize("label", ALL_CLASSES)
def test_ground_truth_is_the_same_patient_without_the_lesion(label: str) -> None:
    sick, healthy = phantom(label, 5, seed=1), phantom("Normal", 5, seed=1)
    assert np.array_equal(sick.ground_truth, healthy.image)
    assert sick.lesion.any() == (label != "Normal")
    outside = ~(np.abs(sick.image - sick.ground_truth) > 0.05)
    assert np.abs(sick.image - sick.ground_truth)[outside].mean() < 0.01


def test_seed_and_patient_determine_the_image() -> None:
    first = phantom("COVID", 3, seed=1).image
    assert np.array_equal(first, phantom("COVID", 3, seed=1).image)
    assert not np.array_equal(first, phantom("COVID", 3, seed=2).image)
    assert not np.array_equal(first, phantom("COVID", 4, seed=1).image)


@pytest.mark.parametrize("label", ["Lung_Opacity", "Viral Pneumonia"])
def test_an_image_is_the_same_at_any_size(label: str) -> None:
    small, large = phantom(label, 8, size=64).image, phantom(label, 8, size=256).image
    reduced = large.reshape(64, 4, 64, 4).mean(axis=(1, 3))
    assert np.corrcoef(small.ravel(), reduced.ravel())[0, 1] > 0.98


def test_covid_is_on_both_sides_and_pneumothorax_is_dark() -> None:
    for n in range(10):
        lesion = phantom("COVID", n).lesion
        assert lesion[:, :32].any()
        assert lesion[:, 32:].any()
        dark = phantom("Pneumothorax", n)
        assert (dark.image - dark.ground_truth)[dark.lesion].mean() < -0.03


def test_a_mass_displaces_the_anatomy_around_it() -> None:
    mass = phantom("Mass", 2, size=128)
    dense = mass.image - mass.ground_truth > 0.15
    assert (np.abs(mass.image - mass.ground_truth) > 0.05).sum() > 1.5 * dense.sum()


def test_a_set_is_a_radiography_folder_with_ground_truth(tmp_path) -> None:
    paths = list(phantom_set(LocalStore(str(tmp_path)), 9, 32, seed=3, classes=("Normal", "COVID", "Pneumothorax")))
    dataset = open_dataset(tmp_path)
    assert dataset.kind == "phantoms"
    assert dataset.classes == {"COVID": 3, "Normal": 3, "Pneumothorax": 3}
    assert sorted(paths) == [image.path for image in dataset.images]
    for image in dataset.images:
        assert image.lung_mask
        assert bool(image.lesion_mask) == bool(image.ground_truth) == (image.label != "Normal")
    metadata = json.loads((tmp_path / "phantoms.json").read_text())
    assert metadata["version"] == VERSION
    assert [image["file"] for image in metadata["images"]] == paths
    sides = {image["label"]: image.get("sides") for image in metadata["images"]}
    assert sides["COVID"] == ["left", "right"]


def test_captions_have_grade_and_side(tmp_path) -> None:
    classes = ("Normal", "COVID", "Pneumothorax")
    list(phantom_set(LocalStore(str(tmp_path)), 30, 32, seed=3, classes=classes))
    dataset = open_dataset(tmp_path / "captions.csv")
    assert dataset.kind == "phantoms"
    assert len(dataset.images) == 30
    factors = {image["file"]: image for image in json.loads((tmp_path / "phantoms.json").read_text())["images"]}
    for image in dataset.images:
        assert bool(image.ground_truth) == (image.label != "Normal")
        expected = factors[image.path]
        if image.label == "Normal":
            assert image.caption == "Normal chest scan"
        elif image.label == "COVID":
            assert image.caption == f"{expected['grade']} COVID 19, bilateral"
        else:
            assert image.caption == f"{expected['grade']} Pneumothorax on the {expected['sides'][0]}"
    for label, key in (("COVID", "severity"), ("Pneumothorax", "depth")):
        grades: dict[str, list[float]] = {"mild": [], "moderate": [], "severe": []}
        for image in factors.values():
            if image["label"] == label:
                grades[image["grade"]].append(image[key])
        ordered = [value for grade in grades.values() for value in sorted(grade)]
        assert all(grades.values())
        assert ordered == sorted(ordered)
    assert not any(image.caption for image in open_dataset(tmp_path).images)  # the folder has no captions


def test_an_unknown_class_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="Measles"):
        next(iter(phantom_set(LocalStore(str(tmp_path)), 1, classes=("Measles",))))


# mean grey levels in thousandths on a 4 x 4 grid, one image of each class
FROZEN = [
    "577 552 518 505 532 454 382 550 585 634 656 591 748 731 658 644",
    "577 552 518 505 536 487 409 550 585 635 658 591 748 731 658 644",
    "577 552 527 505 532 484 405 560 591 634 656 592 748 731 658 644",
    "577 556 525 505 553 495 440 556 594 646 661 596 748 731 658 644",
    "577 552 518 505 532 460 387 550 585 655 699 594 748 731 661 644",
    "575 548 518 505 511 454 382 550 568 632 656 591 748 731 658 644",
    "572 546 519 505 508 481 405 548 568 634 667 591 748 730 659 644",
]
