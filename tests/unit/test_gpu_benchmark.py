"""benchmarks/gpu.py on the day: it imports on a machine that has little, keeps its deadline, and fails line by line."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from gpu_sections import measure  # noqa: E402
from gpu_sections.book import Book, TooLong, time_limit  # noqa: E402
from gpu_train import LegEnds, Until, archived, extract, write_parts  # noqa: E402

ABSENT = (
    "ray s3fs aiobotocore botocore boto3 aiohttp pytorch_fid torchvision matplotlib jinja2 markupsafe rich tensorboard "
    "tensorboardX peft captum bitsandbytes"
)
BARE = f"""
import importlib, importlib.machinery, pathlib, sys
absent = set({ABSENT!r}.split())
found = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] in absent else found(name, path, target)
importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
sys.path.insert(0, "benchmarks")
import gpu, gpu_train
for file in sorted(pathlib.Path("benchmarks/gpu_sections").glob("*.py")):
    importlib.import_module(f"gpu_sections.{{file.stem}}")
there = sorted(absent & {{name.split(".")[0] for name in sys.modules}})
assert not there, there
"""


def test_a_machine_with_torch_and_a_few_wheels_can_import_it() -> None:
    done = subprocess.run([sys.executable, "-c", BARE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def book_at(path: Path, seconds: float = 60.0, **shares: float) -> Book:
    return Book(path, seconds, shares or {"one": 1.0, "two": 1.0}, {"machine": {"device": "none"}})


def out_of_memory() -> dict:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")


def test_a_row_that_fails_is_a_row_with_its_reason(tmp_path: Path) -> None:
    book = book_at(tmp_path / "gpu.json")
    with book.section("one"):
        assert book.row("large", out_of_memory) is None
        assert book.row("wrong", lambda: {"ms": 1 / 0}) is None
        assert book.row("good", lambda: {"ms": 2.0}) == {"ms": 2.0}
    rows = json.loads((tmp_path / "gpu.json").read_text())["sections"]["one"]["rows"]
    assert [row.get("failed", row.get("ms")) for row in rows] == [
        "out of memory", "ZeroDivisionError: division by zero", 2.0,
    ]  # fmt: skip
    assert book.failed_checks == []  # none of them was a check


def test_a_section_that_fails_takes_no_other_along(tmp_path: Path) -> None:
    book = book_at(tmp_path / "gpu.json")
    with book.section("one"):
        raise OSError("no room")
    with book.section("two"):
        book.row("good", lambda: {"ms": 1.0})
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert sections["one"]["failed"] == "OSError: no room"
    assert sections["two"]["rows"][0]["ms"] == 1.0
    assert "no room" in book.table()


def test_checks_decide(tmp_path: Path) -> None:
    book = book_at(tmp_path / "gpu.json")
    with book.section("one"):
        book.check("near", True, 1e-6, 1e-4)
        assert book.failed_checks == []
        book.check("far", float("nan") < 1e-4, float("nan"), 1e-4)  # NaN passes nothing
        book.row("cannot run", out_of_memory, checked=True)
    assert book.failed_checks == ["one: far", "one: cannot run runs"]
    assert json.loads((tmp_path / "gpu.json").read_text())["failed_checks"] == book.failed_checks


def test_a_deadline_inside_a_section_stops_it_and_the_next_has_its_share(tmp_path: Path) -> None:
    book = book_at(tmp_path / "gpu.json", seconds=2.0)
    began = time.monotonic()
    with book.section("one"):
        assert book.row("hangs", lambda: time.sleep(60)) is None  # as a compiler may
        assert book.row("next", lambda: {"ms": 1.0}) is None
    assert time.monotonic() - began < 1.8
    with book.section("two"):
        assert book.row("takes too long", lambda: {"ms": 1.0}, expected_seconds=30) is None
        assert book.row("short", lambda: {"ms": 1.0}) is not None
    found = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert [gap.split(" (")[0] for gap in found["one"]["left_out"]] == ["hangs", "next"]
    assert "stopped after" in found["one"]["left_out"][0]
    assert found["two"]["left_out"] == ["takes too long (no time left)"]


def test_a_row_may_be_given_a_part_of_the_section(tmp_path: Path) -> None:
    book = book_at(tmp_path / "gpu.json", seconds=4.0)
    with book.section("one"):
        assert book.row("compiles for ever", lambda: time.sleep(60), most=0.1) is None
        assert book.row("next", lambda: {"ms": 1.0}) is not None
    assert "compiles for ever (stopped after 0 s)" in book.table()


HANGS = """
import sys, time
from pathlib import Path
sys.path.insert(0, "benchmarks")
from gpu_sections import book
book.LAST_WORDS = 0.2
one = book.Book(Path(sys.argv[1]), 0.3, {"one": 1.0}, {})
one.at_end.append(lambda: print("children are ended"))
one.end_what_hangs()
with one.section("one"):
    one.row("good", lambda: {"ms": 1.0})
    time.sleep(60)  # outside a row: as in C code, which no alarm interrupts
"""


def test_a_process_that_hangs_is_ended_with_its_results_written(tmp_path: Path) -> None:
    words = [sys.executable, "-c", HANGS, str(tmp_path / "gpu.json")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 3, done.stderr
    assert "children are ended" in done.stdout
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert (found["finished"], found["sections"]["one"]["rows"][0]["ms"]) == (False, 1.0)
    assert "after the deadline" in found["hung"]


def test_the_limit_is_not_swallowed_by_who_catches_exceptions() -> None:
    def stubborn() -> None:
        try:
            time.sleep(60)
        except Exception:
            pytest.fail("caught")

    with pytest.raises(TooLong), time_limit(0.05):
        stubborn()


def test_switches_are_set_together_and_put_back() -> None:
    before = measure.switches()
    with measure.switched(**measure.tf32(True), cudnn_deterministic=True):
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.allow_tf32
        assert measure.switches()["cudnn_deterministic"] is True
    assert measure.switches() == before


def test_the_state_of_a_leg_is_cut_and_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model/.train").mkdir(parents=True)
    (tmp_path / "model/.train/weights").write_bytes(bytes(range(256)) * 100)
    monkeypatch.setattr("gpu_train.PART_BYTES", 10_000)
    parts = write_parts(archived(tmp_path / "model", [tmp_path / "model/.train"]), tmp_path)
    assert len(parts) > 2
    assert max(part["bytes"] for part in parts) == 10_000
    (tmp_path / "leg.json").write_text(json.dumps({"parts": parts}))
    extract(tmp_path, tmp_path / "there")
    assert (tmp_path / "there/.train/weights").read_bytes() == bytes(range(256)) * 100
    (tmp_path / parts[1]["file"]).write_bytes(b"torn")
    with pytest.raises(Exception, match="missing or damaged"):
        extract(tmp_path, tmp_path / "again")


def test_a_leg_ends_at_the_last_checkpoint_before_its_deadline() -> None:
    kept = []
    report = Until(lambda metrics, folder: kept.append(metrics["step"]), time.monotonic() + 100)
    report({"step": 1.0}, None)
    report.ends = time.monotonic() + 1
    with pytest.raises(LegEnds):
        report({"step": 2.0}, None)
    assert kept == [1.0, 2.0]  # the last one is kept, too


def run_changed(change: str, out: Path) -> subprocess.CompletedProcess[str]:
    """Run the script with something changed, in a process of its own: its watchdog ends the process it runs in."""
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import gpu\n"
        "from gpu_sections import subject\n"
        f"{change}\ngpu.main(['--device', 'cpu', '--tiny', '--out', {str(out)!r}])"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_without_networks_nothing_is_measured_and_the_command_fails(tmp_path: Path) -> None:
    ended = run_changed("subject.Subject.made = lambda *_: 1 / 0", tmp_path / "gpu.json")
    assert ended.returncode == 1, ended.stdout + ended.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found["sections"]) == ["setup"]
    assert "setup: networks are built" in found["failed_checks"]


def test_slow_imports_leave_time_to_build(tmp_path: Path) -> None:
    """A file without a row must not look like a success because imports took the time."""
    change = "gpu.BEGAN = time.monotonic() - 100; gpu.measure_all = lambda *_: None"
    ended = run_changed(change, tmp_path / "gpu.json")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert json.loads((tmp_path / "gpu.json").read_text())["sections"]["setup"]["rows"]
