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
    """A head whose nodes have the project installed from the wheel, as cluster/Dockerfile does. An editable checkout
    would hide files that are missing in an upload."""
    started = Head(environment / "bin")
    yield started
    started.stop()


@pytest.fixture(scope="session")
def tiny_options(tiny: Recipe) -> list[str]:
    """``--set`` overrides that make the tiny recipe out of the default one."""
    sections = tiny.model_dump(mode="json")
    return [word for key, value in sections.items() for word in ("--set", f"{key}={json.dumps(value)}")]
