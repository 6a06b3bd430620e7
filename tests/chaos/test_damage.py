"""Every file of a run, a model and a half-trained model, damaged in every way, under every verb: no traceback, a
documented exit code, one line; ``verify`` sees it, and ``verify --repair`` with the command that follows mends it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
from run_damage import DOCUMENTED, damages, diffva, linked, one_of_each

ONE_OF = 25  # of so many cases, one is in the fast suite
UNSEEN = ("timings/", "_SUCCESS missing", "_SUCCESS folder", " copied", "reference-")  # damage that harms no reader
BY_HAND = (" folder", " copied")  # a folder in place of a file and a foreign file are the user's to remove


class World(NamedTuple):
    """A data set, a model, and a reduced run with a retry."""

    data: Path
    model: Path
    run: Path

    def generate(self, run: Path) -> tuple[object, ...]:
        return ("generate", "--data", self.data, "--model", self.model, "--out", run, "--executor", "inline",
                "--shard-size", 3, "--limit", 9, "--set", "evaluate.max_quarantined_fraction=0.5")  # fmt: skip


@pytest.fixture(scope="module")
def world(images: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    made = World(folder / "data", model, folder / "run")
    shutil.copytree(images, made.data)
    broken = sorted(made.data.glob("COVID/images/*.png"))
    sound = [file.read_bytes() for file in broken]
    for file, content in zip(broken, sound, strict=True):
        file.write_bytes(b"x" * len(content))
    assert diffva(*made.generate(made.run)).code == 0
    for file, content in zip(broken, sound, strict=True):
        file.write_bytes(content)
    assert diffva("retry", made.run, "--executor", "inline").code == 0
    assert diffva("reduce", made.run, "--executor", "inline").code == 0
    assert (made.run / "overlays/r1/records/part-00000.parquet").exists()
    assert diffva("verify", made.run).code == 0
    return made


def cases(folder: Path, files: list[Path]) -> Iterator[tuple[Path, str]]:
    for file in files:
        for way in damages(folder / file):
            yield file, way


def sampled(name: str, one_of: int) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % one_of == 0


def check(what: str, verb: str, *words: object) -> list[str]:
    """What is wrong with how a command ended."""
    outcome = diffva(*words)
    told = [line for line in outcome.lines if line.startswith(f"diffva {verb}: ")]
    if outcome.trace or outcome.code not in DOCUMENTED:
        return [f"{what}: exit {outcome.code}, {(outcome.trace or outcome.text)[-300:]}"]
    if outcome.code and verb != "verify" and len(told) != 1:
        return [f"{what}: exit {outcome.code} without its one line: {outcome.text[-300:]}"]
    return []


def of_a_run(world: World, scratch: Path, one_of: int) -> tuple[int, list[str]]:
    """Number of cases, and what is wrong."""
    verbs: dict[str, Callable[[Path], tuple[object, ...]]] = {
        "status": lambda run: ("status", run),
        "verify": lambda run: ("verify", run),
        "generate": world.generate,
        "retry": lambda run: ("retry", run, "--executor", "inline"),
        "reduce": lambda run: ("reduce", run, "--executor", "inline"),
    }
    count, wrong = 0, list[str]()
    for file, way in cases(world.run, list(one_of_each(world.run))):
        for verb, words in verbs.items():
            what = f"{file} {way} {verb}"
            if not sampled(what, one_of):
                continue
            run = linked(world.run, scratch / str(count))
            damages(run / file)[way]()
            count += 1
            wrong += check(what, verb, *words(run))
            shutil.rmtree(run)
    return count, wrong


def mended(world: World, scratch: Path, one_of: int) -> tuple[int, list[str]]:
    """Number of damages, and which are not seen or not mended."""
    count, wrong, expected = 0, list[str](), rows(world.run)
    for file, way in cases(world.run, list(one_of_each(world.run))):
        what = f"{file} {way}"
        if not sampled(f"{what} mended", one_of) or any(part in what for part in (*UNSEEN, *BY_HAND)):
            continue
        count += 1
        run = linked(world.run, scratch / f"mended-{count}")
        damages(run / file)[way]()
        seen = diffva("verify", run)
        if not seen.code or file.name not in seen.text:
            wrong.append(f"{what}: verify says {seen.code}, {seen.text[-300:]}")
        if file.name == "run.json" and len(file.parts) == 1:
            (run / file).unlink(missing_ok=True)  # as its message says
        for words in (("verify", run, "--repair"), world.generate(run), ("retry", run, "--executor", "inline"),
                      ("reduce", run, "--executor", "inline")):  # fmt: skip
            outcome = diffva(*words)
        after = diffva("verify", run)
        if outcome.code or after.code or not rows(run).equals(expected):
            wrong.append(f"{what}: not mended, {outcome.text[-200:]} {after.text[-300:]}")
        shutil.rmtree(run)
    return count, wrong


def rows(run: Path) -> pd.DataFrame:
    """The records of a run and of its retry."""
    folders = [run / "records", run / "overlays/r1/records"]
    return pd.concat([pd.read_parquet(folder) for folder in folders], ignore_index=True)


def of_a_model(world: World, scratch: Path, one_of: int) -> tuple[int, list[str]]:
    image = next((world.data / "COVID/images").glob("*.png"))
    verbs: dict[str, Callable[[Path], tuple[object, ...]]] = {
        "status": lambda model: ("status", model),
        "explain": lambda model: ("explain", image, "--model", model, "--out", scratch / "sheet.png"),
        "generate": lambda model: world._replace(model=model).generate(scratch / "run"),
    }
    files = [path.relative_to(world.model) for path in sorted(world.model.rglob("*")) if path.is_file()]
    files = [file for file in files if file.parts[0] != ".train"]
    count, wrong = 0, list[str]()
    for file, way in cases(world.model, files):
        for verb, words in verbs.items():
            what = f"{file} {way} {verb}"
            if not sampled(what, one_of):
                continue
            model = linked(world.model, scratch / f"model-{count}")
            damages(model / file)[way]()
            count += 1
            wrong += check(what, verb, *words(model))
            shutil.rmtree(model)
            shutil.rmtree(scratch / "run", ignore_errors=True)
    return count, wrong


def test_a_sample_of_the_matrix(world: World, tmp_path: Path) -> None:
    for part, one_of in ((of_a_run, ONE_OF), (mended, 20), (of_a_model, 80)):
        count, wrong = part(world, tmp_path, one_of)
        assert count >= 5
        assert wrong == []


@pytest.mark.slow
def test_the_whole_matrix(world: World, tmp_path: Path) -> None:
    total = 0
    for part in (of_a_run, mended, of_a_model):
        count, wrong = part(world, tmp_path, 1)
        assert wrong == []
        total += count
    assert total >= 600
