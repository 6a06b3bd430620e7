"""Whether an edit is where its prompt says."""

from __future__ import annotations

import numpy as np
import pytest

from diffva_ray.evaluate.word_scores import asked, word_rows, word_scores

LUNGS = np.zeros((60, 60), bool)
LUNGS[10:50, 6:26] = LUNGS[10:50, 34:54] = True


def changed(rows: slice, columns: slice, value: float = 0.3) -> np.ndarray:
    made = np.zeros((60, 60), np.float32)
    made[rows, columns] = value
    return made


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Mass on the left", {"side": "left"}),
        ("large Mass in the right upper zone, 63 year old", {"side": "right", "zone": "upper", "size": "large"}),
        ("Bilateral COVID 19", {"side": "bilateral"}),
        ("Mass AND finding on the left NOT finding on the right", {"side": "left"}),
        ("Mass on the left AND Pneumothorax on the right", {}),
        ("normal chest scan, leftover", {}),
    ],
)
def test_what_a_prompt_asks(prompt: str, expected: dict[str, str]) -> None:
    assert asked(prompt) == expected


def test_a_change_is_measured_in_the_patients_words() -> None:
    left_upper = changed(slice(12, 20), slice(36, 50), -0.3)  # the image's right; an added opacity is negative
    found = word_scores("small Mass in the left upper zone", left_upper, LUNGS)
    assert found == {
        "side_asked": "left", "side_made": "left", "side_energy": pytest.approx(1),
        "zone_asked": "upper", "zone_made": "upper", "zone_energy": pytest.approx(1),
        "size_asked": "small", "size_made": "small",
    }  # fmt: skip
    mirrored = word_scores("large Mass in the left lower zone", left_upper[:, ::-1], LUNGS)
    assert (mirrored["side_made"], mirrored["zone_made"], mirrored["size_made"]) == ("right", "upper", "small")
    assert mirrored["side_energy"] == mirrored["zone_energy"] == 0
    assert word_scores("Mass", left_upper, LUNGS) == {}


def test_what_lies_outside_the_lungs_or_below_the_threshold_is_no_change() -> None:
    outside = changed(slice(52, 58), slice(10, 20)) + changed(slice(12, 20), slice(36, 50), 0.1)
    assert word_scores("Mass on the left", outside, LUNGS)["side_made"] == "left"
    faint = word_scores("Mass on the left", changed(slice(12, 20), slice(36, 50), 0.01), LUNGS)
    assert faint["side_made"] is None
    assert faint["side_energy"] == pytest.approx(1)
    assert "side_energy" not in word_scores("Mass on the left", np.zeros((60, 60)), LUNGS)


def test_rows_count_what_is_as_asked() -> None:
    left, right = changed(slice(12, 20), slice(36, 50)), changed(slice(12, 20), slice(10, 24))
    scores = [
        {"label": "Normal", "group": str(n), "prompt": prompt, **word_scores(prompt, signed_map, LUNGS)}
        for n, (prompt, signed_map) in enumerate(
            [("Mass on the left", left)] * 6
            + [("Mass on the left", right)] * 2
            + [("Mass on the right", left), ("Mass", left), ("Mass on the left", 0 * left)]
        )
    ]
    rows = {row["asked"]: row for row in word_rows(scores)}
    assert set(rows) == {"left", "right"}
    assert (rows["left"]["n"], rows["left"]["right"]) == (9, pytest.approx(6 / 9))
    assert rows["left"]["unchanged"] == pytest.approx(1 / 9)
    assert rows["left"]["else"] == "right"
    assert rows["left"]["energy"] == pytest.approx(6 / 8)
    low, high = rows["left"]["right_interval"]
    assert low < 6 / 9 < high
    assert rows["right"]["right"] == 0
    assert word_rows([{"label": "Normal", "group": "1", "prompt": "Mass"}]) == []
    assert word_rows([]) == []
