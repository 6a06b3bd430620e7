"""The tables of README and docs agree with the result files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import tables  # noqa: E402
from gpu_sections.book import Book  # noqa: E402

MACHINE = {"device": "a card", "torch_cuda": "13.0", "versions": {"torch": "2.11.0"}}


def test_pages_have_the_numbers_of_the_results() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_gpu_table_says_so_where_nothing_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "GPU", tmp_path / "gpu.json")
    assert tables.gpu().startswith("Not measured")


def test_the_gpu_table_has_rates_failures_and_gaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "GPU", tmp_path / "gpu.json")
    book = Book(tmp_path / "gpu.json", 60, {"one": 1.0}, {"machine": MACHINE})
    with book.section("one"):
        book.row("step, batch 2", lambda: {"images_per_second": 3.0, "ms": 666.7})
        book.row("step, batch 64", lambda: 1 / 0)  # type: ignore[arg-type]
        book.row("start: pipeline", lambda: {"seconds_to_start": 1.0})
        book.check("same pixels", False, 2, 1)
        book.leave_out("step, compiled")
    assert tables.gpu().splitlines()[2:] == [
        "| device | a card |",
        "| torch, CUDA | 2.11.0, 13.0 |",
        "| checks of correctness | 0 of 1 hold |",
        "| does not hold | one: same pixels |",
        "| step, batch 2 | 3.000 images/s |",
        "| step, batch 64 | ZeroDivisionError: division by zero |",
        "| left out | step, compiled (no time left) |",
    ]
