"""Every statement of the paper: its words are on its line, its values are ours, and what shows it exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from diffva_ray.paper.claims import Claim, claims, value_of
from diffva_ray.paper.experiments import EXPERIMENTS
from diffva_ray.paper.figures import FIGURES

ROOT = Path(__file__).parents[2]
PAPER = ROOT.parent / "shared" / "paper" / "siddiqui2024.txt"
CLAIMS = claims()


@pytest.fixture(scope="module")
def lines() -> list[str]:
    if not PAPER.exists():
        pytest.skip("the paper's text is not beside the checkout")
    return PAPER.read_text("utf-8").split("\n")


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.line}-{claim.claim}")
def test_the_words_are_on_the_line(claim: Claim, lines: list[str]) -> None:
    assert claim.quote in lines[claim.line - 1]


@pytest.mark.parametrize("claim", [claim for claim in CLAIMS if claim.holds], ids=lambda claim: claim.claim)
def test_the_values_are_ours(claim: Claim) -> None:
    for key, value in claim.holds.items():
        assert value_of(key) == value, key


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.claim)
def test_what_shows_it_exists(claim: Claim) -> None:
    assert claim.shown
    for text in claim.shown:
        if text.startswith("diffva paper: "):
            continue
        file, _, name = text.partition("::")
        assert (ROOT / file).exists(), file
        assert not name or f"def {name}(" in (ROOT / file).read_text(), text


def test_nothing_numbered_is_left_out() -> None:
    names = " ".join(claim.claim for claim in CLAIMS)
    for kind, count in (("Contribution", 6), ("Equation", 9), ("Table", 5), ("Figure", 10)):
        assert {int(n) for n in re.findall(rf"{kind} (\d+)", names)} >= set(range(1, count + 1)), kind


def test_nothing_that_the_paper_states_is_called_assumed() -> None:
    """A prompt, number or class on a line of the paper is no choice of ours."""
    assumed = " ".join(text for name in sorted({e.recipe for e in EXPERIMENTS if e.recipe})
                       for text in value_of(f"{name}:assumed"))  # fmt: skip
    for stated in (
        "prompts of table 4",
        "wording of severity",
        "which images are edited",
        "reference set",
        "figure 10",
    ):
        assert stated not in assumed


def test_figures_show_the_run_of_their_caption() -> None:
    """Figure 7 is without image priors and figure 8 without text, as the captions of the paper say."""
    runs = {number: name for number, _, _, name, _ in FIGURES}
    assert (runs[7], runs[8], runs[9]) == ("no-image-prior", "no-text", "neither")
    shows = {experiment.name: experiment.shows for experiment in EXPERIMENTS}
    assert all(f"figure {number}" in shows[name] for number, name in runs.items())
