"""docs/reference says what recipes and commands say of themselves."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from pydantic import BaseModel

from diffva_ray.config import generation as config_methods
from diffva_ray.config import recipe as config
from diffva_ray.config import stages as config_stages

ROOT = Path(__file__).parents[2]
SECTIONS = [
    section
    for module in (config_stages, config_methods, config)
    for section in vars(module).values()
    if isinstance(section, type) and issubclass(section, BaseModel) and section.__module__ == module.__name__
]


def test_pages_are_those_that_the_code_writes() -> None:
    stale = runpy.run_path(str(ROOT / "docs" / "write_reference.py"))["stale"]
    assert stale() == [], "run python docs/write_reference.py"


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_key_is_explained(section: type[BaseModel]) -> None:
    assert section.__doc__
    assert [name for name, field in section.model_fields.items() if not field.description] == []
