"""``diffva demo --quick`` installed from the wheel alone, without a checkout."""

from __future__ import annotations

import json
import os
import subprocess
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    packaged = set(zipfile.ZipFile(wheel).namelist())
    files = [path for path in (ROOT / "diffva_ray").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {str(path.relative_to(ROOT)) for path in files} <= packaged


def on_one_core() -> None:
    """Two threads take several times the work of one when another test uses a core of two."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


@pytest.mark.timeout(1800)
def test_the_quick_demo_goes_from_the_wheel_to_a_page(environment: Path, tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        variables["PATH"] = f"{environment / 'bin'}:{variables['PATH']}"
        return subprocess.run(
            words, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=1500, check=False,
            preexec_fn=on_one_core,
        )  # fmt: skip

    where = run("python", "-c", "import diffva_ray; print(diffva_ray.__file__)").stdout
    assert where.startswith(str(environment)), where

    first = run("diffva", "demo", "--quick")
    assert first.returncode == 0, first.stderr[-2000:]
    assert "index.html" in first.stdout
    assert "AUROC in lungs" in first.stdout
    out = tmp_path / "runs" / "demo"
    for path in ("data/train/phantoms.json", "data/validation", "data/test", "model/model_index.json", "run/_SUCCESS"):
        assert (out / path).exists(), path
    assert (out / "run" / "report" / "index.html").stat().st_size > 10_000

    metrics = json.loads((out / "run" / "tables" / "metrics.json").read_text())
    assert metrics["records"]["ok"] == metrics["records"]["planned"] == 48
    overall = {row["map"]: row for row in metrics["localization"] if row["label"] == "all"}
    # 340 training steps are enough to beat the brightness baseline; the full demo's numbers are in the README
    assert overall["positive"]["auroc"] > overall["brightness"]["auroc"]
    assert overall["positive"]["threshold_from"] == "validation"
    error_left = next(row["lesion_error_ratio"] for row in metrics["ground_truth"] if row["label"] == "all")
    assert error_left < 1.0

    again = run("diffva", "demo", "--quick")
    assert again.returncode == 0
    assert "nothing to do" in again.stderr
