"""Damages the stored files of a run, a model or a half-trained model, one at a time, and gives every command.

A case damages one file of a copy (hard links) of a sound folder and gives one command in this process.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from click.testing import CliRunner
from PIL import Image

from diffva_ray.cli import main

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
    result = CliRunner().invoke(main, [str(word) for word in words])
    unexpected = result.exception is not None and not isinstance(result.exception, SystemExit)
    trace = "".join(traceback.format_exception(*result.exc_info)) if unexpected and result.exc_info else ""
    return Outcome(result.exit_code, result.output.splitlines(), trace)


def linked(source: Path, target: Path) -> Path:
    """A copy of a folder whose files are hard links."""
    return shutil.copytree(source, target, copy_function=os.link)


def one_of_each(folder: Path) -> Iterator[Path]:
    """One file of each kind below a folder, as paths relative to it: the first of each sub-folder and suffix."""
    seen = set()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        relative = file.relative_to(folder)
        parents = [part for part in relative.parts[:-1] if not part.startswith("part-")]
        many = relative.parts[0] in ("records", "timings", "features", "counterfactuals", "attributions",
                                     "reconstructions") or relative.parts[:1] == ("overlays",)  # fmt: skip
        kind = (*parts_of(parents), file.suffix if many and parents else file.name)
        if "report" in parents or kind in seen:
            continue
        seen.add(kind)
        yield relative


def parts_of(parents: list[str]) -> tuple[str, ...]:
    return tuple(parents)
