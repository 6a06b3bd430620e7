"""Two processes work on one shard: none changes a file of the other's commit, and none is taken for dead."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image

from diffva_ray.cli import main
from diffva_ray.config.recipe import Recipe
from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.evaluate.records import read_records
from diffva_ray.generate import processes
from diffva_ray.generate.attempts import Attempt, Session
from diffva_ray.generate.plan import Request
from diffva_ray.generate.run import FingerprintDiffers, Run, open_run
from diffva_ray.generate.run_json import DamagedRun
from diffva_ray.generate.shard import run_shard
from diffva_ray.generate.verification import requeue, verify
from diffva_ray.generate.worker import WorkerContext
from diffva_ray.storage.local import LocalStore
from diffva_ray.workflows.execution import Execution
from diffva_ray.workflows.generate import generate_run

INLINE = Execution(executor="inline")
LIMIT = Request(limit=6)  # one shard


@pytest.fixture
def run(tiny: Recipe, images: Path, model: Path, tmp_path: Path) -> Run:
    """A planned run of one shard."""
    out = str(tmp_path / "run")
    generate_run(tiny, str(images), str(model), out, LIMIT, INLINE)
    made = open_run(out)
    for entry in made.store.list():
        if entry.path not in ("run.json", "plan.parquet", "device.json"):
            made.store.delete(entry.path)
    return made


class Worker:
    """A worker of a host whose CPU rounds differently: its counterfactuals are brighter by ``shift``."""

    def __init__(self, run: Run, images: Path, model: Path, shift: float = 0.0) -> None:
        class Shifted(CounterfactualEngine):
            def __call__(self, *arguments):
                batch = super().__call__(*arguments)
                for image in batch.counterfactuals:
                    image += shift
                return batch

        self.context = WorkerContext.open(run.store.uri, str(images), str(model))
        self.context.engine.__class__ = Shifted

    def work(self, before: Callable[[str], None] = lambda path: None, only: str = "") -> int:
        """Do the shard; ``before`` is called before each file. Returns the number of records that were committed."""
        lock = threading.Lock()  # several threads write

        class Watched(LocalStore):
            def put_if_absent(self, path: str, data: bytes) -> bool:
                if path.startswith(only):
                    with lock:
                        before(path)
                return super().put_if_absent(path, data)

        self.context.run = Run(Watched(self.context.run.store.uri), self.context.run.about)
        return run_shard(self.context, 0)["records"]


def content(run: Run) -> dict[str, bytes]:
    return {entry.path: run.store.read(entry.path) for entry in run.store.list()}


@pytest.mark.parametrize("paused_at", ["counterfactuals/", "attributions/", "features/", "records/"])
@pytest.mark.parametrize("shift", [0.0, 0.1], ids=["equal CPU", "another CPU"])
def test_a_paused_writer_changes_nothing_of_a_committed_shard(
    run: Run, images: Path, model: Path, paused_at: str, shift: float
) -> None:
    """One is paused before its first file of a kind; the other one makes the shard; then the first one goes on."""
    late, other = Worker(run, images, model, shift), Worker(run, images, model)
    committed = dict[str, bytes]()

    def pause(path: str) -> None:
        if not committed:
            assert other.work() == 6
            assert verify(run) == []
            committed.update(content(run))

    assert late.work(pause, paused_at) == 0
    after = content(run)
    assert committed.items() <= after.items()
    assert verify(run) == []
    if not shift:
        assert after.keys() == committed.keys()


def test_the_files_of_a_dead_writer_on_another_cpu_are_not_taken(run: Run, images: Path, model: Path) -> None:
    class Killed(BaseException):
        pass

    def kill(path: str) -> None:
        raise Killed

    with pytest.raises(Killed):
        Worker(run, images, model, 0.1).work(kill, "records/")
    assert not run.done()
    assert Worker(run, images, model).work() == 6
    assert verify(run) == []
    assert verify(run, pixels=False) == []
    reduced = CliRunner().invoke(main, ["reduce", run.store.uri, "--executor", "inline"])
    assert reduced.exit_code == 0, reduced.output
    assert verify(run) == []
    computed = [entry.path for entry in run.store.list("features") if "/part-" in entry.path]
    assert len(computed) == 2, "reduce found the features that the part names"


def test_a_damaged_image_gets_its_own_name_again(run: Run, images: Path, model: Path) -> None:
    Worker(run, images, model).work()
    before = content(run)
    damaged = next(path for path in before if path.startswith("counterfactuals/"))
    run.store.put(damaged, before[damaged][:60])
    run.store.put("features/part-00000.npz", b"")
    assert requeue(run, verify(run)) == 1
    Worker(run, images, model).work()
    timeless = {path: data for path, data in content(run).items() if not path.startswith("timings/")}
    assert timeless == {path: data for path, data in before.items() if not path.startswith("timings/")}


@pytest.mark.parametrize("way", ["truncated", "bomb"])
def test_reduce_refuses_a_damaged_image_of_the_run(run: Run, images: Path, model: Path, way: str) -> None:
    assert isinstance(run.store, LocalStore)
    Worker(run, images, model).work()
    damaged = run.store.list("counterfactuals")[0].path
    run.store.put(damaged, run.store.read(damaged)[:60])
    if way == "bomb":  # 400 million pixels in a few hundred kilobytes
        Image.new("1", (20000, 20000)).save(run.store.root / damaged)
    reduced = CliRunner().invoke(main, ["reduce", run.store.uri, "--executor", "inline"])
    assert reduced.exit_code == 5, reduced.output
    assert damaged in reduced.output
    assert "verify" in reduced.output
    assert not run.store.exists("_SUCCESS")


def test_another_device_is_refused_by_name(
    run: Run, images: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = json.loads(run.store.read("device.json"))["device_name"]
    monkeypatch.setattr(CounterfactualEngine, "device_name", "NVIDIA Z9")
    with pytest.raises(FingerprintDiffers, match=rf"device_name: '{first}' there, 'NVIDIA Z9' now.*--allow-env"):
        WorkerContext.open(run.store.uri, str(images), str(model))
    words = ["generate", "--data", images, "--model", model, "--out", run.store.uri, "--executor", "inline",
             "--limit", "6", "--recipe", run.store.uri + ".yaml"]  # fmt: skip
    Path(run.store.uri + ".yaml").write_text(json.dumps(run.about["recipe"]))
    refused = CliRunner().invoke(main, list(map(str, words)))
    assert refused.exit_code == 3, refused.output
    assert "NVIDIA Z9" in refused.output
    assert not run.done()
    allowed = CliRunner().invoke(main, [*map(str, words), "--allow-environment-change"])
    assert allowed.exit_code == 0, allowed.output
    assert set(read_records(run)["device"]) == {"NVIDIA Z9"}
    assert open_run(run.store.uri).about["environment_changes"] == [{"device_name": "NVIDIA Z9"}], "once"


def test_a_run_without_a_device_takes_the_first_one(run: Run, images: Path, model: Path) -> None:
    run.store.delete("device.json")
    Worker(run, images, model).work()
    assert json.loads(run.store.read("device.json"))["device_name"] == read_records(run)["device"][0]


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"device_name": 7}'])
def test_verify_sees_a_damaged_device_and_repair_writes_it(
    run: Run, images: Path, model: Path, content: bytes | None
) -> None:
    Worker(run, images, model).work()
    before = run.store.read("device.json")
    run.store.delete("device.json") if content is None else run.store.put("device.json", content)
    problems = verify(run)
    assert [problem.what.split()[0] for problem in problems] == ["device.json"]
    assert requeue(run, problems) == 0
    assert run.store.read("device.json") == before
    assert verify(run) == []


@pytest.mark.parametrize("key", ["records", "shards"])
def test_run_json_that_disagrees_with_its_plan_is_damaged(run: Run, key: str) -> None:
    about = {**run.about, key: run.about[key] + 1}
    with pytest.raises(DamagedRun, match=rf"run\.json is damaged \(.*{run.about['records']} in {run.shards} planned"):
        verify(replace(run, about=about))


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[str]]:
    """A process that says what ``this_process`` is and sleeps."""
    code = (
        "import json, time; from diffva_ray.generate.processes import *\n"
        "print(json.dumps(this_process()), flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()


def test_the_kernel_tells_whether_a_process_runs(sleeper: subprocess.Popen[str]) -> None:
    assert sleeper.stdout is not None
    process = json.loads(sleeper.stdout.readline())
    assert processes.is_running(process)
    sleeper.send_signal(signal.SIGSTOP)
    assert processes.is_running(process)
    assert not processes.is_running({**process, "started": "1"}), "its number belongs to another process"
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert not processes.is_running(process), "killed, and not reaped yet"


@pytest.mark.parametrize(("age", "dead"), [(10.0, False), (processes.MAX_SILENCE + 1, True)])
def test_another_host_shows_by_its_beat_that_it_lives(tmp_path: Path, age: float, dead: bool) -> None:
    store = LocalStore(str(tmp_path))
    far = Attempt(store, 0, Session(process={"host": "far", "pid": os.getpid(), "started": None}))
    far._mark("try")
    (marker,) = store.list("attempts")
    beat = json.loads(store.read(marker.path))
    store.put(marker.path, json.dumps({**beat, "beat": time.time() - age}).encode())
    assert Attempt(store, 0, Session()).isolated is dead


def test_a_long_attempt_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "HEARTBEAT", 0.01)
    store = LocalStore(str(tmp_path))
    with Attempt(store, 0, Session()) as attempt, attempt.in_progress("image"):
        beats = {entry.path: store.read(entry.path) for entry in store.list("attempts")}
        deadline = time.monotonic() + 60
        while any(store.read(path) == beat for path, beat in beats.items()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(beats) == 2
        assert all(store.read(path) != beat for path, beat in beats.items())
    assert store.list("attempts") == []


def test_paused_and_slow_drivers_are_not_taken_for_dead(images: Path, model: Path, tmp_path: Path) -> None:
    """Four drivers of one run, one shard per image; three are paused, each in the middle of the first shard."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "diffva_ray", "generate", "--data", images, "--model", model, "--out", out,
               "--executor", "inline", "--shard-size", "1", "--limit", "2", "--steps", "400"]  # fmt: skip

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    paused = list[subprocess.Popen[str]]()
    try:
        for number in range(1, 4):
            paused.append(start())
            deadline = time.monotonic() + 120
            while len(list(out.glob("attempts/part-00000/try~*"))) < number and time.monotonic() < deadline:
                time.sleep(0.01)
            paused[-1].send_signal(signal.SIGSTOP)
            assert len(list(out.glob("attempts/part-00000/try~*"))) == number
        last = start()
        said, _ = last.communicate(timeout=300)
        assert last.returncode == 0, said
        assert set(pd.read_parquet(out / "records")["status"]) == {"ok"}
        before = content(open_run(str(out)))
        for driver in paused:
            driver.send_signal(signal.SIGCONT)
        for driver in paused:
            said, _ = driver.communicate(timeout=300)
            assert driver.returncode == 0, said
    finally:
        for driver in paused:
            driver.kill()
    after = content(open_run(str(out)))
    assert {path: data for path, data in before.items() if not path.startswith("attempts/")} == after
    assert verify(open_run(str(out))) == []
