"""``diffva demo --quick``: the newcomer's command, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(1800)
def test_the_quick_demo_goes_from_nothing_to_a_page(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "diffva_ray.cli", "demo", "--quick", "--out", str(out)]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    first = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert first.returncode == 0, first.stderr[-2000:]
    assert "index.html" in first.stdout
    assert "AUROC in lungs" in first.stdout
    for path in ("data/train/phantoms.json", "data/validation", "data/test", "model/model_index.json", "run/_SUCCESS"):
        assert (out / path).exists(), path
    assert (out / "run" / "report" / "index.html").stat().st_size > 10_000

    metrics = json.loads((out / "run" / "tables" / "metrics.json").read_text())
    assert metrics["records"]["ok"] == metrics["records"]["planned"] == 48
    overall = {row["map"]: row for row in metrics["localization"] if row["label"] == "all"}
    # 340 steps teach it enough to beat the film's own brightness; the full demo's numbers are in the README
    assert overall["positive"]["auroc"] > overall["brightness"]["auroc"]
    assert overall["positive"]["threshold_from"] == "validation"
    error_left = next(row["lesion_error_ratio"] for row in metrics["twin"] if row["label"] == "all")
    assert error_left < 1.0

    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert again.returncode == 0
    assert "nothing to do" in again.stderr
