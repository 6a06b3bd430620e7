"""A finished run of the tiny model, with one unreadable image among the phantoms."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from diffva_ray.cli import main

Export = Callable[..., Result]


def diffva(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def finished(images: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """17 records in three shards, and a quarantined one; the data set is beside the run."""
    folder = tmp_path_factory.mktemp("export")
    shutil.copytree(images, folder / "data")
    next((folder / "data" / "COVID" / "images").iterdir()).write_bytes(b"no image")
    more = ("--executor", "inline", "--set", "evaluate.max_quarantined_fraction=0.5")
    made = diffva("generate", "--data", folder / "data", "--model", model, "--out", folder / "run", *more)
    assert made.exit_code == 0, made.output
    assert diffva("reduce", folder / "run", "--executor", "inline").exit_code == 0
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run and its data set, which a test may change."""
    shutil.copytree(finished.parent, tmp_path / "own")
    return tmp_path / "own" / "run"


@pytest.fixture
def export(tmp_path: Path) -> Export:
    """``export(run, format, *options, out=...)`` calls the command."""

    def call(run: Path, kind: str, *options: object, out: Path = tmp_path / "out") -> Result:
        return diffva("export", run, "--to", kind, "--out", out, *options)

    return call
