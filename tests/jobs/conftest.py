"""A head for jobs, and the tiny recipe as options of a job."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from head import Head

from diffva_ray.config import Recipe


@pytest.fixture(scope="session")
def head() -> Iterator[Head]:
    started = Head()
    yield started
    started.stop()


@pytest.fixture(scope="session")
def tiny_options(tiny: Recipe) -> list[str]:
    """``--set`` overrides that make the tiny recipe out of the default one."""
    sections = tiny.model_dump(mode="json")
    return [word for key, value in sections.items() for word in ("--set", f"{key}={json.dumps(value)}")]
