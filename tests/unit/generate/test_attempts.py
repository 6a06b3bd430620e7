"""After a death, a shard is halved around the record that caused it, and not done record by record."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from diffva_ray.config.recipe import Recipe
from diffva_ray.generate import shard
from diffva_ray.generate.attempts import MAX_SHARD_DEATHS, RAY, Attempt, Session, WorkersKeepDying
from diffva_ray.generate.plan import Request
from diffva_ray.storage.local import LocalStore
from diffva_ray.workflows.execution import Execution
from diffva_ray.workflows.generate import generate_run

MINE = Session(RAY, "mine", "here")
NO_PROCESS = 2**22 + 1  # beyond Linux's largest process id


def died(store: LocalStore, session: Session, *groups: tuple[int, int]) -> None:
    """Leave the markers of a worker that died on each of the groups."""
    for start, stop in groups:
        attempt = Attempt(store, 0, replace(session, process={**session.process, "pid": NO_PROCESS}))
        attempt._mark("try")
        attempt._mark("group", f"{start}-{stop}")


@pytest.mark.parametrize("poison", [0, 13, 100, 255])
def test_a_poison_record_is_found_in_a_logarithm_of_attempts(poison: int, tmp_path: Path) -> None:
    """256 records in micro-batches of 64: each attempt ends at the group with the record, which comes first."""
    store, calls, rounds = LocalStore(str(tmp_path)), 0, 0
    while True:
        groups = Attempt(store, 0, MINE).groups(256, 64)
        assert sorted(n for group in groups for n in group) == list(range(256))
        position = next(n for n, group in enumerate(groups) if poison in group)
        calls += position + 1
        if len(groups[position]) == 1:
            break
        rounds += 1
        died(store, MINE, (groups[position].start, groups[position].stop))
    assert rounds == 6
    assert calls <= 4 + 2 * 6 + 2
    assert len(groups) == 4 + 6  # what is left for the attempt that gets through


def test_two_poison_records_are_no_broken_machine(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    for poison in (3, 200):
        size = 64
        while size > 1:
            died(store, MINE, (poison // size * size, poison // size * size + size))
            size //= 2
        with Attempt(store, 0, MINE):
            pass
    assert len(Attempt(store, 0, MINE).suspects) == 12


def test_a_machine_that_kills_every_group_ends_the_run(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    died(store, MINE, *((n, n + 2) for n in range(0, 6 * MAX_SHARD_DEATHS, 2)))
    with pytest.raises(WorkersKeepDying, match="points to the machine"), Attempt(store, 0, MINE):
        pass


def test_a_shard_in_groups_has_the_records_of_one_in_batches(
    tiny: Recipe, images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with a group of three, which is padded, and with few calls of the networks."""
    calls, generate = list[int](), shard._generate

    def counted(context: shard.WorkerContext, sources: list) -> list:
        calls.append(len(sources))
        return generate(context, sources)

    monkeypatch.setattr(shard, "_generate", counted)
    inline = Execution(executor="inline")
    generate_run(tiny, str(images), str(model), str(tmp_path), Request(), inline)
    assert calls == [4, 2] * 3
    folder = tmp_path / "counterfactuals/part-00000"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    (tmp_path / "records/part-00000.parquet").unlink()
    calls.clear()
    died(LocalStore(str(tmp_path)), Session(), (0, 3))
    generate_run(tiny, str(images), str(model), str(tmp_path), Request(), inline)
    assert calls == [1, 3, 2]
    assert len(before) == 6
    assert {file.name.rpartition("~")[2]: file.read_bytes() for file in folder.iterdir()} == before
    assert not list((tmp_path / "attempts").rglob("*~*"))
