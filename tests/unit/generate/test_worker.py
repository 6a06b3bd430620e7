"""Shards of one worker at once: one generates, the others read or commit; a suspected one runs alone."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from diffva_ray.config.recipe import Recipe
from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.evaluate.records import read_records
from diffva_ray.generate import processes
from diffva_ray.generate.attempts import INLINE, Marker
from diffva_ray.generate.plan import Request
from diffva_ray.generate.run import FOLDERS, Run, open_run, part
from diffva_ray.generate.shard import run_shard
from diffva_ray.generate.verification import verify
from diffva_ray.generate.worker import Turns, WorkerContext
from diffva_ray.storage.local import LocalStore
from diffva_ray.workflows.execution import Execution
from diffva_ray.workflows.generate import generate_run

WAIT = 120  # seconds


@pytest.fixture(scope="module")
def finished(tiny: Recipe, images: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of three shards of six records."""
    out = tmp_path_factory.mktemp("run")
    generate_run(tiny, str(images), str(model), str(out), Request(), Execution(executor="inline"))
    return open_run(str(out))


@pytest.fixture
def planned(finished: Run, tmp_path: Path) -> Run:
    """The same run before the first shard."""
    for name in ("run.json", "plan.parquet", "device.json"):
        LocalStore(str(tmp_path / "run")).put(name, finished.store.read(name))
    return open_run(str(tmp_path / "run"))


def images_of(run: Run) -> dict[str, bytes]:
    return {path: run.store.read(path) for kind in (*FOLDERS, "features") for path, _ in run.store.list(kind)}


def test_shards_at_once_give_the_run_of_a_loop(
    finished: Run, planned: Run, images: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = WorkerContext.open(planned.store.uri, str(images), str(model))
    inside, most, threads = [0], [0], set[int]()
    run_batch = CounterfactualEngine._run

    def counted(self, *arguments):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        threads.add(torch.get_num_threads())
        try:
            return run_batch(self, *arguments)
        finally:
            inside[0] -= 1

    monkeypatch.setattr(CounterfactualEngine, "_run", counted)
    with ThreadPoolExecutor(3) as pool:
        reports = list(pool.map(lambda shard: run_shard(context, shard), range(3)))
    assert [report["records"] for report in reports] == [6, 6, 6]
    assert most == [1], "two threads used the model at once"
    assert threads == {context.engine.config.cpu_threads}
    assert read_records(planned).equals(read_records(finished))
    assert images_of(planned) == images_of(finished)
    assert verify(planned) == []
    for shard in range(3):
        seconds = json.loads(planned.store.read(f"timings/{part(shard)}.json"))
        assert {"encode", "denoise", "decode", "write"} <= seconds.keys()
        assert min(seconds.values()) >= 0


def test_the_next_shard_is_generated_while_the_last_one_is_committed(planned: Run, images: Path, model: Path) -> None:
    """The first shard's commit waits until the second shard is generated: in one thread, or under one lock, never."""
    context = WorkerContext.open(planned.store.uri, str(images), str(model))
    generated = threading.Event()

    class Slow(LocalStore):
        def put_if_absent(self, path: str, data: bytes) -> bool:
            if path == f"records/{part(0)}.parquet":
                assert generated.wait(WAIT), "the commit of a shard stops the next one"
            if path.startswith(f"counterfactuals/{part(1)}/"):
                generated.set()
            return super().put_if_absent(path, data)

    context.run = Run(Slow(planned.store.uri), planned.about)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(run_shard, context, 0)
        second = pool.submit(run_shard, context, 1)
        assert first.result()["records"] == second.result()["records"] == 6
    assert verify(planned) != []  # the third shard is missing
    assert planned.pending() == [2]


def test_a_shard_on_which_a_worker_died_runs_alone(
    planned: Run, images: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    dead = {**processes.this_process(), "pid": child.pid, "started": 1}
    marker = Marker("try", INLINE, "driver", "", "token", "")
    planned.store.put(f"attempts/{part(1)}/{marker.name}", json.dumps(dead).encode())
    context = WorkerContext.open(planned.store.uri, str(images), str(model))
    running, beside = set[int](), []
    run_batch = CounterfactualEngine._run

    class Watched(LocalStore):
        def put(self, path: str, data: bytes) -> None:
            if path.startswith("attempts/") and "/try~" in path:
                running.add(int(path.split("/")[1][-5:]))
            super().put(path, data)

        def delete(self, path: str) -> None:
            if path.startswith("attempts/") and "/try~" in path and "~token~" not in path:
                running.discard(int(path.split("/")[1][-5:]))
            super().delete(path)

    def watched(self, *arguments):
        time.sleep(0.05)
        beside.append(set(running))
        return run_batch(self, *arguments)

    monkeypatch.setattr(CounterfactualEngine, "_run", watched)
    context.run = Run(Watched(planned.store.uri), planned.about)
    with ThreadPoolExecutor(3) as pool:
        assert [report["records"] for report in pool.map(lambda shard: run_shard(context, shard), range(3))] == [6] * 3
    assert any(1 in shards for shards in beside)
    assert all(shards == {1} for shards in beside if 1 in shards), "a death would not be its own"
    assert verify(planned) == []


def test_one_that_waits_to_run_alone_is_not_overtaken() -> None:
    turns, entered, leave = Turns(), [], threading.Event()

    def shared(name: str) -> None:
        with turns(alone=False):
            entered.append(name)
            assert leave.wait(WAIT)

    def alone() -> None:
        with turns(alone=True):
            entered.append("alone")

    threads = [threading.Thread(target=shared, args=["first"])]
    threads[0].start()
    while not entered:
        time.sleep(0.001)
    threads.append(threading.Thread(target=alone))
    threads[1].start()
    while not turns._alone:
        time.sleep(0.001)
    threads.append(threading.Thread(target=shared, args=["second"]))
    threads[2].start()
    time.sleep(0.05)
    assert entered == ["first"]
    leave.set()
    for thread in threads:
        thread.join(WAIT)
    assert entered == ["first", "alone", "second"]
