"""Benchmarks that no other test runs, at toy size: they still fit the product that they measure."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: object) -> None:
    command = [sys.executable, f"benchmarks/{script}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_planning(tmp_path: Path) -> None:
    run("planning.py", "--sizes", 600, "--out", tmp_path / "planning.json")
    (row,) = json.loads((tmp_path / "planning.json").read_text())["curve"]
    assert row["plan"]["shards"] == 3
    assert row["reduce"]["rows_of_distances"] > 0


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_report(tmp_path: Path) -> None:
    run("report.py", "--images", 60, "--result", tmp_path / "report.json")
    (row,) = json.loads((tmp_path / "report.json").read_text())["runs"]
    assert row["records"] == 60
    assert row["page"]["ready_s"] > 0
