"""``experiments/mass_effect.py``: the controls get the scores that they must have, so the score tells apart taking the
mass away and putting the anatomy back."""

from __future__ import annotations

import mass_effect
import numpy as np
import pytest

from diffva_ray.data.phantoms import phantom


@pytest.fixture(scope="module")
def patients() -> list[mass_effect.Displaced]:
    return [mass_effect.displaced(n) for n in range(6)]


def test_the_image_and_its_truth_are_the_phantoms(patients: list[mass_effect.Displaced]) -> None:
    same = phantom("Mass", 2, mass_effect.SEED)
    assert np.array_equal(patients[2].image, same.image)
    assert np.array_equal(patients[2].truth, same.ground_truth)


def test_the_controls_have_known_scores(patients: list[mass_effect.Displaced]) -> None:
    rows = mass_effect.controls(patients)
    for part in mass_effect.PARTS:
        assert rows["the untouched image"][f"{part}_left"] == pytest.approx(1)
        assert rows["the ground truth"][f"{part}_left"] == 0
    removed, put_back = rows["mass removed, anatomy displaced"], rows["anatomy put back, mass kept"]
    assert removed["mass_left"] < 0.5
    assert removed["displaced_left"] == pytest.approx(1, abs=0.1)
    assert put_back["mass_left"] > 0.5
    assert put_back["displaced_left"] < 0.1
    low, high = removed["displaced_interval"]
    assert low < removed["displaced_left"] < high


def test_the_parts_do_not_overlap_and_both_are_there(patients: list[mass_effect.Displaced]) -> None:
    for patient in patients:
        mass, displaced = (patient.parts[part] for part in mass_effect.PARTS)
        assert mass.any()
        assert displaced.any()
        assert not (mass & displaced).any()
