"""Phantom v2: each factor changes what its word says, and nothing else."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from diffva_ray.cli import main
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.factor_phantoms import factor_phantom, factor_set
from diffva_ray.data.factors import OF_A_CLASS, Factors, Finding, sample_factors, single_changes, third
from diffva_ray.data.images import decode_square
from diffva_ray.data.phantoms import Phantom
from diffva_ray.data.places import SIDES, SIZES, ZONES
from diffva_ray.metrics.cardiothoracic import cardiothoracic_ratio
from diffva_ray.storage.local import LocalStore

OPACITY = Factors(50, "M", "PA", (Finding("Lung_Opacity", "left", "middle", 0.5, 0.6),))
PATIENTS = range(12)


def with_first(factors: Factors, **changes: object) -> Factors:
    return replace(factors, findings=(replace(factors.findings[0], **changes), *factors.findings[1:]))


def made(factors: Factors) -> list[Phantom]:
    return [factor_phantom(factors, patient, seed=5) for patient in PATIENTS]


def centre(phantom: Phantom) -> tuple[float, float]:
    """Row and column of the lesion as fractions of the lungs' height and width."""
    rows, columns = (np.flatnonzero(phantom.lungs.any(axis=axis)) for axis in (1, 0))
    row, column = np.argwhere(phantom.lesion).mean(axis=0)
    return (row - rows[0]) / np.ptp(rows), (column - columns[0]) / np.ptp(columns)


@pytest.mark.parametrize("label", ["Lung_Opacity", "Mass"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("zone", ZONES)
def test_a_lesion_is_where_its_words_say(label: str, side: str, zone: str) -> None:
    finding = Finding(label, side, zone, size=0.4, severity=0.8 if label == "Lung_Opacity" else None)
    for phantom in made(replace(OPACITY, findings=(finding,))):
        down, across = centre(phantom)
        assert (across > 0.5) == (side == "left")  # the patient's left is on the image's right
        assert third(np.clip(down, 0, 1 - 1e-9), ZONES) == zone


def test_a_pneumothorax_is_on_its_side() -> None:
    for side in SIDES:
        factors = replace(OPACITY, findings=(Finding("Pneumothorax", side, size=0.8),))
        assert {centre(phantom)[1] > 0.5 for phantom in made(factors)} == {side == "left"}


@pytest.mark.parametrize("label", ["Lung_Opacity", "Mass", "Pneumothorax"])
def test_size_is_area(label: str) -> None:
    own = {"severity": 0.5} if label == "Lung_Opacity" else {}
    zone = "" if label == "Pneumothorax" else "middle"
    areas = [
        np.mean(
            [p.lesion.mean() for p in made(replace(OPACITY, findings=(Finding(label, "left", zone, size, **own),)))]
        )
        for size in (0.0, 0.5, 1.0)
    ]
    assert areas[0] * 1.2 < areas[1] < areas[2] / 1.2


@pytest.mark.parametrize("label", [label for label, own in OF_A_CLASS.items() if "severity" in own])
def test_severity_is_contrast(label: str) -> None:
    place = {"side": "left", "zone": "middle", "size": 0.5} if label == "Lung_Opacity" else {}
    for patient in PATIENTS:
        changes = []
        for severity in (0.0, 0.5, 1.0):
            factors = replace(OPACITY, findings=(Finding(label, severity=severity, **place),))
            phantom = factor_phantom(factors, patient, seed=5)
            changes.append(np.abs(phantom.image - phantom.ground_truth).sum())
        assert changes == sorted(changes)


def ribs(phantom: Phantom) -> float:
    """Contrast of the ribs: mean vertical change inside the lungs."""
    return float(np.abs(np.diff(phantom.ground_truth, axis=0))[phantom.lungs[1:]].mean())


def test_with_age_bone_fades_the_heart_grows_and_the_lungs_get_lower() -> None:
    for patient in PATIENTS:
        ages = [factor_phantom(Factors(age, "M", "PA"), patient, seed=5, size=128) for age in (20, 50, 90)]
        ratios = [cardiothoracic_ratio(phantom.lungs) for phantom in ages]
        heights = [phantom.lungs.any(axis=1).sum() for phantom in ages]
        assert ratios == sorted(ratios)
        assert ratios[0] < ratios[2]
        assert heights[0] > heights[1] > heights[2]
        assert ribs(ages[0]) > ribs(ages[1]) > ribs(ages[2])


def test_the_heart_is_larger_and_the_clavicles_are_higher_ap() -> None:
    for patient in PATIENTS:
        pa, ap = (factor_phantom(Factors(50, "M", view), patient, seed=5, size=128) for view in ("PA", "AP"))
        assert cardiothoracic_ratio(ap.lungs) > cardiothoracic_ratio(pa.lungs)


def test_women_have_breast_tissue_over_the_lower_lungs() -> None:
    for patient in PATIENTS:
        man, woman = (factor_phantom(Factors(50, sex, "PA"), patient, seed=5) for sex in ("M", "F"))
        both = man.lungs & woman.lungs
        both[: np.flatnonzero(both.any(axis=1)).mean().astype(int)] = False
        assert (woman.image - man.image)[both].mean() > 0.005


def test_a_change_of_the_lesion_keeps_the_patient() -> None:
    """The lesion moves or grows; the healthy patient is the same to the last bit, and so is the tissue around it."""
    before = factor_phantom(OPACITY, 3, seed=5)
    for name, new in single_changes(OPACITY).items():
        after = factor_phantom(new, 3, seed=5)
        if name in ("age", "sex", "view"):
            assert not np.array_equal(after.ground_truth, before.ground_truth), name
            assert new.findings == OPACITY.findings
            continue
        assert np.array_equal(after.ground_truth, before.ground_truth), name
        around = ~(before.lesion | after.lesion)
        assert np.abs(after.image - before.image)[around].max() <= 0.1
        assert (after.lesion != before.lesion).any() or name == "severity"


def test_every_factor_of_a_finding_can_be_replaced_alone() -> None:
    for label, own in OF_A_CLASS.items():
        rng = np.random.default_rng(0)
        factors = next(f for f in (sample_factors(label, rng) for _ in range(50)) if len(f.findings) > 1)
        changes = single_changes(factors)
        assert set(changes) == {"age", "sex", "view", "second", *own}
        for name, new in changes.items():
            columns, old = new.columns(), factors.columns()
            differing = {key for key in old if columns[key] != old[key]}
            expected = {key for key in old if key.startswith(name) and old[key]}
            assert differing == expected, (label, name)


def test_a_second_finding_is_added_to_the_first() -> None:
    first = OPACITY
    second = Finding("Mass", "right", "upper", size=0.6)
    both = replace(first, findings=(*first.findings, second))
    for patient in PATIENTS:
        one, two = (factor_phantom(factors, patient, seed=5) for factors in (first, both))
        half = one.image.shape[1] // 2
        assert np.abs(two.image - one.image)[:, int(1.3 * half) :].mean() < 0.01  # the mass displaces little there
        assert two.lesion[one.lesion].mean() > 0.9
        assert np.abs(two.image - one.image)[:, :half].max() > 0.15


def test_sampled_factors_cover_their_values() -> None:
    rng = np.random.default_rng(1)
    drawn = [sample_factors("Lung_Opacity", rng) for _ in range(600)]
    words = [factors.findings[0].words() for factors in drawn]
    for name, values in (("side", SIDES), ("zone", ZONES), ("size", SIZES)):
        shares = [np.mean([word[name] == value for word in words]) for value in values]
        assert min(shares) > 0.8 / len(values), (name, shares)
    assert {factors.view for factors in drawn} == {"AP", "PA"}
    assert {factors.age for factors in drawn} == set(range(20, 91))
    assert 0.2 < np.mean([len(factors.findings) == 2 for factors in drawn]) < 0.4


def test_a_set_names_the_factors_of_its_images(tmp_path: Path) -> None:
    classes = ("Normal", "Lung_Opacity", "Mass", "COVID")
    paths = list(factor_set(LocalStore(str(tmp_path)), 16, 32, seed=3, classes=classes))
    dataset = open_dataset(tmp_path / "factors.csv")
    assert dataset.kind == "phantoms"
    assert sorted(paths) == [image.path for image in dataset.images]
    assert not list(tmp_path.rglob("changes*"))
    numbers = {image["file"]: image for image in json.loads((tmp_path / "phantoms.json").read_text())["images"]}
    for image in dataset.images:
        assert image.patient
        assert image.columns["view"] in ("AP", "PA")
        assert image.columns["sex"] in ("F", "M")
        assert 20 <= int(image.columns["age"]) <= 90
        assert bool(image.ground_truth) == (image.label != "Normal")
        found = numbers[image.path]["findings"]
        assert [finding["label"] for finding in found] == [
            label for label in (image.label, image.columns.get("second", "")) if label not in ("Normal", "")
        ]
        if image.label == "Mass":
            assert image.columns["size"] == third(found[0]["size"], SIZES)


def test_changes_are_written_beside_their_image(tmp_path: Path) -> None:
    list(factor_set(LocalStore(str(tmp_path)), 4, 32, seed=3, classes=("Normal", "Mass"), changes=True))
    rows = list(csv.DictReader((tmp_path / "changes.csv").open()))
    assert {row["factor"] for row in rows if row["path"].startswith("Normal")} == {"age", "sex", "view"}
    assert {"side", "zone", "size"} <= {row["factor"] for row in rows if row["path"].startswith("Mass")}
    for row in rows:
        before, after = (decode_square((tmp_path / row[key]).read_bytes(), 32)[0] for key in ("path", "changed"))
        assert row["before"] != row["after"]
        assert np.abs(after - before).max() > 0.02, row
    assert len(open_dataset(tmp_path)) == 4  # the folder's images are the set's alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--changes"], "--changes needs --factors"),
        (["--factors", "--onto", "data"], "--factors and --onto cannot be combined"),
        (["--factors", "--classes", "Measles"], "no factors for class 'Measles'"),
    ],
)
def test_refused_in_one_line(options: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["phantoms", str(tmp_path / "out"), "--patients", "2", *options])
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
