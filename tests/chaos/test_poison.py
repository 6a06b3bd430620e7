"""A record that kills its process is quarantined, and no other record is."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from faults import NO_PROCESS, Faults, FaultyStore, Stopped

from diffva_ray.config.recipe import Recipe
from diffva_ray.evaluate.records import read_records
from diffva_ray.generate import processes
from diffva_ray.generate import shard as shards
from diffva_ray.generate.attempts import MAX_SHARD_DEATHS, RAY, Attempt, OutOfMemory, Session, WorkersKeepDying
from diffva_ray.generate.plan import Request
from diffva_ray.generate.run import Run, find_run
from diffva_ray.generate.verification import verify
from diffva_ray.storage import opening
from diffva_ray.storage.local import LocalStore
from diffva_ray.workflows.execution import Execution
from diffva_ray.workflows.generate import generate_run

INLINE = Execution(executor="inline")


def opened(out: Path) -> Run:
    run = find_run(LocalStore(str(out)))
    assert run is not None
    return run


@pytest.fixture(scope="module")
def undisturbed(tiny: Recipe, images: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    out = tmp_path_factory.mktemp("undisturbed")
    generate_run(tiny, str(images), str(model), str(out), Request(), INLINE)
    return read_records(opened(out))


class Inline:
    """Lives of an inline driver, which ``deadly`` images end, up to ``deaths`` times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, out: Path, deadly: set[str], deaths: int = 1000) -> None:
        self.faults = Faults(0, stop=0, fail=0, tear=0, delay=0)
        self.deaths = 0
        read = shards.read_source

        def reading(bench, row):
            if row["image_path"] in deadly and self.deaths < deaths:
                self.deaths += 1
                self.faults.die()
            return read(bench, row)

        monkeypatch.setattr(shards, "read_source", reading)
        monkeypatch.setattr(processes, "this_process", self.faults.process)
        plain = opening.STORES[""]
        monkeypatch.setitem(
            opening.STORES, "", lambda uri: FaultyStore(uri, self.faults) if uri.startswith(str(out)) else plain(uri)
        )

    def live(self, tiny: Recipe, images: Path, model: Path, out: Path) -> bool:
        self.faults.begin()
        try:
            generate_run(tiny, str(images), str(model), str(out), Request(), INLINE)
        except Stopped:
            return False
        return True


def test_a_deadly_record_is_quarantined_and_no_other(
    undisturbed: pd.DataFrame, tiny: Recipe, images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadly = undisturbed["image_path"][7]
    driver = Inline(monkeypatch, tmp_path, {deadly})
    lives = 1
    while not driver.live(tiny, images, model, tmp_path):
        lives += 1
        assert lives < 10
    assert driver.deaths == 6  # in the shard, in its micro-batch of four, in half of it, three times alone
    found = read_records(opened(tmp_path))
    (killed,) = found[found["status"] != "ok"].to_dict("records")
    assert (killed["image_path"], killed["status"]) == (deadly, "killed_worker")
    assert "the only one in progress" in killed["error"]
    others = found["image_path"] != deadly
    pd.testing.assert_frame_equal(found[others], undisturbed[others], check_dtype=False)  # ints beside nulls
    assert verify(opened(tmp_path)) == []
    assert opened(tmp_path).store.list("attempts") == []


def test_a_record_that_succeeds_is_cleared(
    undisturbed: pd.DataFrame, tiny: Recipe, images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Inline(monkeypatch, tmp_path, {undisturbed["image_path"][7]}, deaths=3)
    while not driver.live(tiny, images, model, tmp_path):
        pass
    assert driver.deaths == 3
    assert read_records(opened(tmp_path)).equals(undisturbed)


def leave(store: LocalStore, session: Session, record: str = "") -> None:
    """Write the markers of an attempt whose process died, during ``record`` if given."""
    attempt = Attempt(store, 0, replace(session, process={**session.process, "pid": NO_PROCESS}))
    attempt._mark("try")
    if record:
        attempt._mark("flight", record)


def test_only_deaths_of_this_driver_on_living_nodes_count(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    alive = {"here", "there"}
    mine = Session(RAY, "mine", "here", lambda node: node in alive)
    leave(store, Session(RAY, "former", "here"), "image")
    leave(store, Session(), "image")
    assert not Attempt(store, 0, mine).isolated  # those of an earlier driver and of a plain loop do not count
    leave(store, Session(RAY, "mine", "there"), "image")
    leave(store, Session(RAY, "mine", "here"), "image")
    assert Attempt(store, 0, mine).poison_records == {"image"}
    alive.remove("there")  # preempted: deaths there do not count
    assert Attempt(store, 0, mine).isolated
    assert Attempt(store, 0, mine).poison_records == set()
    with Attempt(store, 0, mine) as attempt, attempt.in_progress("image"):
        pass
    assert not Attempt(store, 0, mine).failure_counts


def test_a_shard_that_no_worker_survives_ends_the_run(tmp_path: Path) -> None:
    store, session = LocalStore(str(tmp_path)), Session(RAY, "mine", "here")
    for number in range(MAX_SHARD_DEATHS):
        leave(store, session, f"image-{number}")
    with pytest.raises(WorkersKeepDying, match="points to the machine"), Attempt(store, 0, session):
        pass
    with Attempt(store, 0, Session(RAY, "next", "here")) as attempt:
        assert not attempt.isolated


def test_running_out_of_memory_quarantines_no_record(
    tiny: Recipe, images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffva_ray.counterfactual.engine import CounterfactualEngine

    def full(self, *arguments):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(CounterfactualEngine, "__call__", full)
    with pytest.raises(OutOfMemory, match="smaller --micro-batch"):
        generate_run(tiny, str(images), str(model), str(tmp_path), Request(), INLINE)
    (marker,) = opened(tmp_path).store.list("attempts")
    assert "/memory~" in marker.path
    monkeypatch.undo()
    counts = generate_run(tiny, str(images), str(model), str(tmp_path), Request(), INLINE)
    assert counts["ok"] == 18


def test_on_ray_two_deaths_quarantine_a_record(
    undisturbed: pd.DataFrame, tiny: Recipe, images: Path, model: Path, tmp_path: Path
) -> None:
    import ray

    from diffva_ray.distributed import session

    deadly = [undisturbed["image_path"][2], undisturbed["image_path"][13]]  # of two shards
    for name, value in session.ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    environment = {"DEADLY_IMAGES": ":".join(deadly), "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _node_ip_address="127.0.0.1",
        runtime_env={"worker_process_setup_hook": "lethal.prepare_worker", "env_vars": environment},
    )
    try:
        counts = generate_run(
            tiny, str(images), str(model), str(tmp_path), Request(), Execution(executor="ray", actors=2)
        )
    finally:
        ray.shutdown()
    assert counts == {"shards": 3, "records": 18, "ok": 16}
    found = read_records(opened(tmp_path))
    assert set(found[found["status"] == "killed_worker"]["image_path"]) == set(deadly)
    others = ~found["image_path"].isin(deadly)
    pd.testing.assert_frame_equal(found[others], undisturbed[others], check_dtype=False)  # ints beside nulls
    assert opened(tmp_path).store.list("attempts") == []
