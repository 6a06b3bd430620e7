"""One word per thing: the words of the private dialect stay out of code, help, columns and pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("diffva_ray", "jobs", "benchmarks", "experiments")
KINDS = (".py", ".js", ".html", ".css", ".yaml", ".json")
OLD = r"film|twin|heal(?!th)|healed|census|workplace|finisher"
WORD = re.compile(rf"(?<![a-z])(?:{OLD})s?(?![a-z])", re.IGNORECASE)
ALLOWED = (
    "normal healthy abnormal chest scan x ray film",  # the tokenizer's word list: prompts may hold the word
    "twins/",  # the folder of earlier phantom sets, which is refused by its name
)
FILES = [
    path
    for name in FOLDERS
    for path in sorted((ROOT / name).rglob("*"))
    if path.suffix in KINDS and "weights" not in path.parts  # a tokenizer holds words that prompts may have
]


@pytest.mark.parametrize("folder", FOLDERS)
def test_old_words_are_gone(folder: str) -> None:
    found = {}
    for path in (path for path in FILES if path.is_relative_to(ROOT / folder)):
        text = path.read_text()
        for allowed in ALLOWED:
            text = text.replace(allowed, "")
        lines = text.splitlines()
        if bad := [f"{number}: {line.strip()[:80]}" for number, line in enumerate(lines, 1) if WORD.search(line)]:
            found[str(path.relative_to(ROOT))] = bad
    assert not found, "write image, counterfactual, ground truth, generate ... (docs/glossary.md)"


def test_the_pattern_finds_what_it_is_for() -> None:
    for text in ("film", "films", "read_film", "Twin", "twins/", "heal(", "healed", "film_set", "true-twin"):
        assert WORD.search(text), text
    for text in ("health", "healthy", "healthier", "profile"):
        assert not WORD.search(text), text
