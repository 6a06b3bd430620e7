"""The tables of README and docs agree with the result files."""

from __future__ import annotations

import json
import re
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


# Results of a checkout with uncommitted changes, which nobody can reproduce exactly. Run these again from a commit, and
# take them out of this list; nothing may be added to it.
NOT_REPRODUCIBLE = {
    "attribution", "damage", "implants", "planning", "real_pack_without_implants", "report",
}  # fmt: skip


def test_no_further_result_is_made_with_uncommitted_changes() -> None:
    files = [file for folder in ("benchmarks", "experiments") for file in (ROOT / folder / "results").glob("*.json")]
    found = {file.stem: tables.revisions(json.loads(file.read_text())) for file in files}
    assert {name for name, revisions in found.items() if any(dirty for _, dirty in revisions)} == NOT_REPRODUCIBLE


def test_a_table_names_the_revisions_of_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    old = {"code_revision": "75dc5dab84dd-dirty (seeds 0 and 1), c1ae6762f5cc (seed 2)"}
    assert tables.revisions(old) == [("75dc5dab84dd", True), ("c1ae6762f5cc", False)]
    assert tables.revisions({"revision": "3004f85d21ad"}) == [("3004f85d21ad", False)]
    monkeypatch.setattr(tables, "dates", lambda: {"75dc5dab84dd": "2026-11-25", "c1ae6762f5cc": ""})
    monkeypatch.setattr(tables, "read", {"leaders": old, "other": {}})
    assert tables.provenance() == (
        "\n`leaders.json`: revision 75dc5dab84dd (2026-11-25, with uncommitted changes) and c1ae6762f5cc (not in this "
        "history); `other.json`: names no revision.\n"
    )


def test_every_table_of_results_has_such_a_line() -> None:
    for name in tables.PAGES:
        for block in tables.BLOCK.finditer((ROOT / name).read_text()):
            if block[2] not in ("paper-claims", "gpu"):  # made of no result file
                assert re.search("json`: (revision|names no) ", block[3].splitlines()[-1]), (name, block[2])


def test_the_gpu_table_says_so_where_nothing_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "GPU", tmp_path / "gpu.json")
    rows = tables.gpu().splitlines()[2:]
    assert len(rows) == len(tables.GPU_AIMS)
    assert all(row.endswith("| not measured |") for row in rows)


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
