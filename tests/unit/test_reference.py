"""docs/reference agrees with recipes, columns and commands in the code."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from pydantic import BaseModel

from diffva_ray.config import generation, recipe, stages

ROOT = Path(__file__).parents[2]
SECTIONS = [
    section
    for module in (stages, generation, recipe)
    for section in vars(module).values()
    if isinstance(section, type) and issubclass(section, BaseModel) and section.__module__ == module.__name__
]


def test_pages_are_current() -> None:
    stale = runpy.run_path(str(ROOT / "docs" / "write_reference.py"))["stale"]
    assert stale() == [], "run python docs/write_reference.py"


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_key_is_explained(section: type[BaseModel]) -> None:
    assert section.__doc__
    assert [name for name, field in section.model_fields.items() if not field.description] == []
