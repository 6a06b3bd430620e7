"""A finished run of the tiny model, with one unreadable image among the phantoms."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from dicom_files import STUDY, dicom
from export_files import diffva
from PIL import Image

Export = Callable[..., Result]


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
        return diffva("export", run, "--to", kind, "--out", out, "--executor", "inline", *options)

    return call


@pytest.fixture(scope="session")
def dicom_run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reduced run on two DICOM images of 96 rows and 64 columns, and a PNG file of the same shape."""
    folder = tmp_path_factory.mktemp("dicom")
    pytest.importorskip("pydicom")
    images = folder / "data" / "COVID" / "images"
    images.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(2):
        pixels = random.integers(0, 4000, (96, 64))
        instance = f"1.2.826.0.1.3680043.8.498.10.{number}"
        (images / f"{number}.dcm").write_bytes(dicom(pixels, **STUDY, SOPInstanceUID=instance))
    Image.fromarray(random.integers(0, 255, (96, 64), np.uint8)).save(images / "plain.png")
    made = diffva(
        "generate", "--data", folder / "data", "--model", model, "--out", folder / "run", "--executor", "inline"
    )
    assert made.exit_code == 0, made.output
    assert diffva("reduce", folder / "run", "--executor", "inline").exit_code == 0
    return folder / "run"
