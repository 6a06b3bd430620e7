"""Damages the stored files of a run, a model or a half-trained model, one at a time, and gives every command.

    python tests/chaos/run_damage.py --out benchmarks/results/damage.json     # all cases, hours
    python tests/chaos/run_damage.py --one-of 20                              # of 20 cases, one

A case damages one file of a copy (hard links) of a sound folder and gives one command in this process. Right is: no
traceback, a documented exit code, and one line for every failure. ``verify`` sees the damage of a run, and
``verify --repair`` with the commands that follow mends it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import click
import numpy as np
import pandas as pd
from click.testing import CliRunner
from PIL import Image

from diffva_ray.cli import main as diffva_main
from diffva_ray.config.recipe import load_recipe, to_yaml
from diffva_ray.data.phantoms import phantom_set
from diffva_ray.provenance import code_revision
from diffva_ray.storage.local import LocalStore
from diffva_ray.train.checkpoint import Checkpoints

UNSEEN = ("timings/", "_SUCCESS missing", "_SUCCESS folder", " copied", "reference-")  # damage that harms no reader
BY_HAND = (" folder", " copied")  # a folder in place of a file and a foreign file are the user's to remove
OF_SHARDS = ("records", "timings", "features", "counterfactuals", "attributions", "reconstructions")
DOCUMENTED = (0, 2, 3, 4, 5)  # exit codes
SHAPES = {"list": b"[]", "object": b"{}", "null": b"null", "number": b"7", "nested": b'{"files": [1], "records": "x"}'}


def bomb() -> bytes:
    """A PNG of 400 million pixels in a few hundred kilobytes."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((20000, 20000), bool)).save(buffer, "PNG")
    return buffer.getvalue()


BOMB = bomb()


def replace(file: Path, content: bytes) -> None:
    """Write a new file, because other copies are links to the old one."""
    file.unlink()
    file.write_bytes(content)


def damages(file: Path) -> dict[str, Callable[[], object]]:
    """The ways to damage a file, by name."""
    content = file.read_bytes()
    ways: dict[str, Callable[[], object]] = {
        "empty": lambda: replace(file, b""),
        "truncated": lambda: replace(file, content[: len(content) // 2]),
        "binary": lambda: replace(file, b"\xff\xfe\x00\x81" * 16),
        "missing": file.unlink,
        "folder": lambda: (file.unlink(), file.mkdir()),
        "copied": lambda: shutil.copy(file, file.with_name(f"{file.stem} (1){file.suffix}")),
    }
    if len(content) > 64:
        flipped = content[:-40] + bytes(byte ^ 255 for byte in content[-40:-32]) + content[-32:]
        ways["flipped"] = lambda: replace(file, flipped)
    if file.suffix == ".json":
        for name, text in SHAPES.items():
            ways[f"json {name}"] = lambda text=text: replace(file, text)
        values = json.loads(content)
        for key in values if isinstance(values, dict) else ():
            for name, value in (("number", 7), ("object", {"a": []})):
                text = json.dumps({**values, key: value}).encode()
                ways[f"{key} is {name}"] = lambda text=text: replace(file, text)
    if file.suffix == ".png":
        ways["bomb"] = lambda: replace(file, BOMB)
    return ways


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    lines: list[str]  # stderr and stdout
    trace: str  # of an exception that was no documented error; else empty

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def diffva(*words: object) -> Outcome:
    """Give a command in this process."""
    result = CliRunner().invoke(diffva_main, [str(word) for word in words])
    unexpected = result.exception is not None and not isinstance(result.exception, SystemExit)
    trace = "".join(traceback.format_exception(*result.exc_info)) if unexpected and result.exc_info else ""
    return Outcome(result.exit_code, result.output.splitlines(), trace)


def linked(source: Path, target: Path) -> Path:
    """A copy of a folder whose files are hard links."""
    return shutil.copytree(source, target, copy_function=os.link)


def one_of_each(folder: Path) -> Iterator[Path]:
    """One file of each kind below a folder, as paths relative to it: of the files of shards and retries the first of
    each sub-folder and suffix, of the tables the first of each suffix, and all others but the report's."""
    seen = set()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        relative = file.relative_to(folder)
        parents = tuple(part for part in relative.parts[:-1] if not part.startswith("part-"))
        many = parents[:1] in [(name,) for name in (*OF_SHARDS, "overlays")]
        table = parents[:1] == ("tables",) and file.name not in ("metrics.json", "thresholds.json")
        kind = (*parents, file.suffix if many or table else file.name)
        if "report" not in parents and kind not in seen:
            seen.add(kind)
            yield relative


class World(NamedTuple):
    """A data set, a model, a reduced run with a retry, and a half-trained model."""

    data: Path
    model: Path
    run: Path
    recipe: Path
    half: Path

    def generate(self, run: Path) -> tuple[object, ...]:
        return ("generate", "--data", self.data, "--model", self.model, "--out", run, "--executor", "inline",
                "--shard-size", 3, "--limit", 9, "--set", "evaluate.max_quarantined_fraction=0.5")  # fmt: skip

    def train(self, out: Path) -> tuple[object, ...]:
        return ("train", "--data", self.data, "--out", out, "--recipe", self.recipe, "--executor", "inline")


def make_world(folder: Path, images: Path, model: Path, recipe: Path) -> World:
    """Make the run and the half-trained model below ``folder``."""
    made = World(folder / "data", model, folder / "run", recipe, folder / "half")
    # a run with a retry
    shutil.copytree(images, made.data)
    broken = sorted(made.data.glob("COVID/images/*.png"))
    sound = [file.read_bytes() for file in broken]
    for file, content in zip(broken, sound, strict=True):
        file.write_bytes(b"x" * len(content))
    assert diffva(*made.generate(made.run)).code == 0
    for file, content in zip(broken, sound, strict=True):
        file.write_bytes(content)
    for verb in ("retry", "reduce"):
        ended = diffva(verb, made.run, "--executor", "inline")
        assert ended.code == 0, ended.text
    assert (made.run / "overlays/r1/records/part-00000.parquet").exists()
    assert diffva("verify", made.run).code == 0
    # a training that is interrupted after its third checkpoint
    keep, count = Checkpoints.__call__, 0

    def interrupted(self: Checkpoints, metrics: dict[str, float], checkpoint: Path | None) -> None:
        nonlocal count
        keep(self, metrics, checkpoint)
        count += checkpoint is not None
        if count == 3:
            raise KeyboardInterrupt

    with patch.object(Checkpoints, "__call__", interrupted):
        assert diffva(*made.train(made.half)).code == 130
    assert len(list((made.half / ".train").glob("checkpoint-*"))) == 2
    return made


def cases(folder: Path, files: list[Path]) -> Iterator[tuple[Path, str]]:
    for file in files:
        for way in damages(folder / file):
            yield file, way


def sampled(name: str, one_of: int) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % one_of == 0


def check(what: str, *words: object) -> list[str]:
    """What is wrong with how a command ended."""
    verb, outcome = words[0], diffva(*words)
    told = [line for line in outcome.lines if line.startswith(f"diffva {verb}: ")]
    if outcome.trace or outcome.code not in DOCUMENTED:
        return [f"{what}: exit {outcome.code}, {(outcome.trace or outcome.text)[-600:]}"]
    if outcome.code and verb != "verify" and len(told) != 1:
        return [f"{what}: exit {outcome.code} without its one line: {outcome.text[-300:]}"]
    return []


Verbs = dict[str, Callable[[Path], tuple[object, ...]]]  # by name; the argument is the damaged folder


def matrix(source: Path, files: list[Path], verbs: Verbs, scratch: Path, one_of: int) -> tuple[int, list[str]]:
    """Number of cases, and what is wrong: every damage of every file under every verb."""
    count, wrong = 0, list[str]()
    for file, way in cases(source, files):
        for verb, words in verbs.items():
            what = f"{file} {way} {verb}"
            if sampled(what, one_of):
                scratch.mkdir()
                folder = linked(source, scratch / source.name)
                damages(folder / file)[way]()
                count += 1
                wrong += check(what, *words(folder))
                shutil.rmtree(scratch)
    return count, wrong


def of_a_run(world: World, scratch: Path, one_of: int) -> tuple[int, list[str]]:
    verbs: Verbs = {
        "status": lambda run: ("status", run),
        "verify": lambda run: ("verify", run),
        "generate": world.generate,
        "retry": lambda run: ("retry", run, "--executor", "inline"),
        "reduce": lambda run: ("reduce", run, "--executor", "inline"),
        "report": lambda run: ("report", run),
        "compare": lambda run: ("compare", run, world.run, "--out", run.parent / "comparison"),
    }
    return matrix(world.run, list(one_of_each(world.run)), verbs, scratch / "case", one_of)


def of_a_model(world: World, scratch: Path, one_of: int) -> tuple[int, list[str]]:
    image = next((world.data / "COVID/images").glob("*.png"))
    verbs: Verbs = {
        "status": lambda model: ("status", model),
        "explain": lambda model: ("explain", image, "--model", model, "--out", model.parent / "sheet.png"),
        "generate": lambda model: world._replace(model=model).generate(model.parent / "run"),
    }
    files = [path.relative_to(world.model) for path in sorted(world.model.rglob("*")) if path.is_file()]
    files = [file for file in files if file.parts[0] != ".train"]
    return matrix(world.model, files, verbs, scratch / "case", one_of)


def of_a_training(world: World, scratch: Path, one_of: int) -> tuple[int, list[str]]:
    verbs: Verbs = {"status": lambda half: ("status", half), "train": world.train}
    files = [path.relative_to(world.half) for path in sorted(world.half.rglob("*")) if path.is_file()]
    return matrix(world.half, files, verbs, scratch / "case", one_of)


def mended(world: World, scratch: Path, one_of: int) -> tuple[int, list[str]]:
    """Number of damages of a run, and which are not seen or not mended."""
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


PARTS = {"run": of_a_run, "model": of_a_model, "half-trained model": of_a_training, "run, repaired": mended}


@click.command()
@click.option("--one-of", default=1, help="Of so many cases, one.")
@click.option("--part", "names", multiple=True, type=click.Choice(list(PARTS)), help="Default: all parts.")
@click.option("--out", type=click.Path(path_type=Path), help="Result file (JSON).")
def main(one_of: int, names: tuple[str, ...], out: Path | None) -> None:
    """Run the matrix; exit 1 and print what is wrong."""
    from conftest import TINY

    folder = Path(tempfile.mkdtemp(prefix="diffva-damage-"))
    for _ in phantom_set(LocalStore(str(folder / "images")), 24, 32, seed=11):
        pass
    recipe = folder / "tiny.yaml"
    recipe.write_text(to_yaml(load_recipe("phantom", TINY)))
    trained = diffva("train", "--data", folder / "images", "--out", folder / "model", "--recipe", recipe,
                     "--executor", "inline")  # fmt: skip
    assert trained.code == 0, trained.text
    world = make_world(folder, folder / "images", folder / "model", recipe)
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    result: dict[str, Any] = {"code": code_revision(), "machine": machine, "one_of": one_of}
    total, failures = 0, list[str]()
    for name in names or PARTS:
        started = time.monotonic()
        count, wrong = PARTS[name](world, folder, one_of)
        result[name] = {"cases": count, "wrong": len(wrong), "seconds": round(time.monotonic() - started)}
        click.echo(f"{name}: {result[name]}\n" + "\n".join(wrong))
        total, failures = total + count, failures + wrong
        result |= {"cases": total, "wrong": len(failures), "tracebacks": sum("Traceback" in line for line in failures)}
        if out:
            out.write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(folder)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
