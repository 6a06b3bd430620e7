"""Words for places: the part of the lungs that a prompt names, and the prompt without them."""

from __future__ import annotations

import numpy as np
import pytest

from diffva_ray.config.prompts import parts
from diffva_ray.data.place_words import place_mask, without_place


@pytest.fixture
def lungs() -> np.ndarray:
    """Two lungs, 20 rows high; the image's middle is not theirs."""
    mask = np.zeros((40, 40), bool)
    mask[6:36, 10:18], mask[6:36, 24:32] = True, True
    return mask


@pytest.mark.parametrize(
    ("prompt", "rows", "columns"),
    [
        ("Mass on the left", (6, 36), (24, 32)),
        ("Mass in the right upper zone", (6, 16), (10, 18)),
        ("opacity in the lower zone", (26, 36), (10, 32)),
        ("Mass", (6, 36), (10, 32)),
        ("Mass on the left AND Lung Opacity on the right", (6, 36), (10, 32)),
    ],
)
def test_a_prompt_names_a_part_of_the_lungs(
    prompt: str, rows: tuple[int, int], columns: tuple[int, int], lungs: np.ndarray
) -> None:
    expected = np.zeros_like(lungs)
    expected[slice(*rows), slice(*columns)] = True
    np.testing.assert_array_equal(place_mask(prompt, lungs), lungs & expected)


@pytest.mark.parametrize(
    ("prompt", "rest"),
    [
        ("Mass on the left", "Mass"),
        ("Mass in the left upper zone, 60 year old woman", "Mass, 60 year old woman"),
        ("bilateral Lung Opacity", "Lung Opacity"),
        ("Lung Opacity of the right lung AND wires", "Lung Opacity AND wires"),
        ("normal chest scan", "normal chest scan"),
    ],
)
def test_the_network_reads_the_prompt_without_its_place(prompt: str, rest: str) -> None:
    assert without_place(prompt) == rest


def test_composed_prompts_stay_prompts() -> None:
    for prompt, rest in {
        "mild Mass on the left TO severe Mass on the left :0.3": "mild Mass TO severe Mass :0.3",
        "Mass on the left AND 80 year old :0.5 NOT Lung Opacity": "Mass AND 80 year old :0.5 NOT Lung Opacity",
        "COVID 19, bilateral": "COVID 19",
    }.items():
        assert without_place(prompt) == rest
        parts(rest)  # is read
