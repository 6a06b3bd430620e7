"""The exports in a new environment that has the readers of others, and not this package."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from diffva_ray.export.formats import FORMATS

READERS = ("datasets", "webdataset", "pycocotools", "highdicom", "duckdb", "pandas", "pillow", "mlcroissant")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    installed = subprocess.run([python, "-m", "pip", "install", "--quiet", *READERS], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"the readers cannot be installed: {installed.stderr.strip().splitlines()[-1][:200]}")
    return python


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finished", "dicom_run"])
def test_others_read_what_the_run_holds(
    name: str, python: Path, export: Callable[..., Result], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(name)
    for kind in FORMATS:
        more = ("--threshold", 0.02) if kind in ("coco", "dicom") else ()
        result = export(run, kind, *more, out=tmp_path / kind)
        assert result.exit_code == 0, result.output
    script = Path(__file__).with_name("elsewhere.py")
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    read = subprocess.run(
        [python, str(script), str(run), str(tmp_path)], capture_output=True, text=True, env=clean, cwd=tmp_path
    )
    assert read.returncode == 0, read.stdout + read.stderr
    assert [line.partition(":")[0] for line in read.stdout.splitlines() if "equal" in line] == [
        "huggingface", "webdataset", "dicom", "coco",
    ]  # fmt: skip
