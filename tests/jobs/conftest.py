"""A head for jobs, and the tiny recipe as options of a job."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from head import Head

from diffva_ray.config.recipe import Recipe


@pytest.fixture(scope="session")
def head(environment: Path) -> Iterator[Head]:
    """Its nodes have the project as cluster/Dockerfile installs it: the wheel, not an editable checkout, which would
    answer for whatever an upload lacks."""
    started = Head(environment / "bin")
    yield started
    started.stop()


@pytest.fixture(scope="session")
def tiny_options(tiny: Recipe) -> list[str]:
    """``--set`` overrides that make the tiny recipe out of the default one."""
    sections = tiny.model_dump(mode="json")
    return [word for key, value in sections.items() for word in ("--set", f"{key}={json.dumps(value)}")]
