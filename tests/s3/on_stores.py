"""What tests of object stores share: commands whose paths are on a server, and writers at the same moment."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from click.testing import CliRunner, Result

from diffva_ray.cli import main
from diffva_ray.storage.local import LocalStore
from diffva_ray.storage.opening import open_store


def upload(folder: Path, uri: str) -> None:
    store = open_store(uri)
    for entry in LocalStore(str(folder)).list():
        if not entry.path.startswith(".train"):
            store.put(entry.path, (folder / entry.path).read_bytes())


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments])


def diffva(*arguments: str) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def in_threads(act: Callable[[int], bool], count: int = 8) -> list[bool]:
    """``act(n)`` in that many threads at the same moment."""
    barrier = threading.Barrier(count)

    def together(n: int) -> bool:
        barrier.wait()
        return act(n)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(together, range(count)))


def one_line(result: Result) -> str:
    """The one line about its failure that a command ends with."""
    assert isinstance(result.exception, SystemExit), result.exception
    *before, said = result.output.strip().splitlines()
    assert said.startswith("diffva "), said
    assert not [line for line in before if "Traceback" in line or "diffva " in line], before
    return said
