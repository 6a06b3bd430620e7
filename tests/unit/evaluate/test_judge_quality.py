"""A flip rate is a key figure only if the judge was tested and did better than always naming one class."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from diffva_ray.cli import main
from diffva_ray.evaluate.judge_quality import JudgeQuality, wilson
from diffva_ray.evaluate.report.numbers import cards, glance


@pytest.mark.parametrize(
    ("quality", "says"),
    [
        (JudgeQuality(0.5, 4, 0.5), "at chance"),
        (JudgeQuality(0.75, 4, 0.5), "at chance"),  # three of four: 30 to 95 %
        (JudgeQuality(1.0, 4, 0.5), ""),
        (JudgeQuality(0.6, 1000, 0.5), ""),
        (JudgeQuality(0.6, 1000, 0.9), "at chance"),  # 90 % of the images are of one class
        (JudgeQuality(None, 0, 0.5), "tested on no image"),
        (JudgeQuality(0.913, 240, 0.25), ""),
    ],
)
def test_when_a_judge_is_reliable(quality: JudgeQuality, says: str) -> None:
    assert says in quality.problem
    assert bool(says) == bool(quality.problem)


METRICS = {
    "records": {"planned": 5, "ok": 5, "quarantined": 0},
    "validity": [{"label": "ill", "n": 5, "flip_rate": 1.0, "confidence_gain": 0.005}],
}
DONE = {"planned": 5, "ok": 5, "quarantined": 0}


def test_the_key_figure_is_replaced_by_the_reason() -> None:
    metrics = {**METRICS, "judge": JudgeQuality(0.5, 4, 0.5).as_dict()}
    said = " ".join(glance(metrics))
    assert "100" not in said
    assert "No flip rate is stated, because the judge is at chance: 50.0% of 4 held-out images right" in said
    card = next(card for card in cards(metrics, DONE) if card.title == "Flip rate")
    assert (card.value, "at chance" in card.detail) == ("–", True)


def test_a_tested_judge_is_shown_with_its_rate() -> None:
    said = " ".join(glance({**METRICS, "judge": JudgeQuality(0.9, 200, 0.25).as_dict()}))
    assert "own judge (right on 90.0 % of 200 held-out images, 85.1 to 93.4 %)" in said
    assert "100.0 % of the counterfactuals healthy" in said
    assert "independent" not in said


def test_a_run_with_an_untested_judge_notes_it_everywhere(images: Path, model: Path, tmp_path: Path) -> None:
    """The tiny model was trained on six images of a class, and none was held out."""

    def diffva(*words: object):
        return CliRunner().invoke(main, [str(word) for word in words])

    out = tmp_path / "run"
    made = diffva("generate", "--data", images, "--model", model, "--out", out, "--executor", "inline")
    assert made.exit_code == 0
    reduced = diffva("reduce", out, "--executor", "inline")
    assert reduced.exit_code == 0
    assert "the judge was tested on no image" in " ".join(reduced.output.split())
    metrics = json.loads((out / "tables" / "metrics.json").read_text())
    assert metrics["judge"]["n"] == 0
    assert diffva("report", out).exit_code == 0
    page = (out / "report" / "index.html").read_text()
    assert page.index("Flip rates on this page are not reliable") < page.index('id="key"')
    assert "No result is stated" in page  # it is of training images besides


def test_wilson_against_the_formula_of_statsmodels() -> None:
    """proportion_confint(9, 10, method="wilson") and of (0, 10), by statsmodels 0.14."""
    assert wilson(0.9, 10) == pytest.approx((0.5958500, 0.9821238), abs=1e-6)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-6)
