"""A local store that fails, tears, delays and stops the process between any two of its steps, reproducibly.

What happens at a step follows from (seed, life, step, path, how often that step came by), never from timing or thread
order, so a history is repeated by its seed.
"""

from __future__ import annotations

import errno
import hashlib
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from diffva_ray.storage.store import Entry, LocalStore

RANDOM = re.compile(r"~[0-9a-f]*~[^~]*~[0-9a-f]*~|\.tmp-[0-9a-f]+")  # the random part of markers and temporary files


class Stopped(BaseException):
    """The process is gone: nothing after this may touch the store, not even a ``finally``."""


@dataclass
class Faults:
    """What goes wrong in one history. A life is one process; the last lives are left in peace."""

    seed: int
    stop: float = 0.006
    fail: float = 0.006
    tear: float = 0.02
    delay: float = 0.01
    lives: int = 6  # with faults
    life: int = 0
    dead: bool = False
    seen: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self) -> None:
        self.life += 1
        self.dead = False
        self.seen.clear()

    def _draw(self, step: str, path: str) -> float:
        key = f"{step} {RANDOM.sub('~', path)}"
        with self.lock:
            self.seen[key] += 1
            key = f"{self.seed} {self.life} {key} {self.seen[key]}"
        return int(hashlib.sha256(key.encode()).hexdigest()[:13], 16) / 16**13

    def at(self, step: str, path: str) -> None:
        """Between two steps: go on, wait, fail, or be gone."""
        if self.dead:
            raise Stopped
        if self.life > self.lives:
            return
        draw = self._draw(step, path)
        if draw < self.stop:
            self.die()
        elif draw < self.stop + self.fail:
            self.counts["failures"] += 1
            raise OSError(errno.EIO, "input/output error (injected)")
        elif draw < self.stop + self.fail + self.delay:
            self.counts["delays"] += 1
            time.sleep(0.001)

    def torn(self, path: str) -> bool:
        """Whether only half of a file is to reach the disk, and nobody lives to clean up."""
        if self.dead or self.life > self.lives or self._draw("tear", path) >= self.tear:
            return False
        self.counts["torn"] += 1
        return True

    def die(self) -> None:
        self.dead = True
        self.counts["kills"] += 1
        raise Stopped


class FaultyStore(LocalStore):
    """``LocalStore`` with a fault point before each of its steps."""

    def __init__(self, uri: str, faults: Faults) -> None:
        super().__init__(uri)
        self.faults = faults

    def read(self, path: str) -> bytes:
        with self._reading(path):
            self.faults.at("read", path)
        return super().read(path)

    def exists(self, path: str) -> bool:
        self._alive()
        return super().exists(path)

    def list(self, prefix: str = "") -> list[Entry]:
        self._alive()
        return super().list(prefix)

    def delete(self, path: str) -> None:
        with self._writing(path):
            self.faults.at("delete", path)
        super().delete(path)

    def put(self, path: str, data: bytes) -> None:
        if path.startswith("attempts/") and "/try~" in path:
            self.faults.counts["attempts"] += 1
        super().put(path, data)

    def _alive(self) -> None:
        if self.faults.dead:
            raise Stopped

    def _write(self, temporary: Path, data: bytes) -> None:
        where = str(temporary.relative_to(self.root))
        self.faults.at("write", where)
        if self.faults.torn(where):
            super()._write(temporary, data[: len(data) // 2])
            self.faults.die()
        super()._write(temporary, data)

    def _move(self, temporary: Path, target: Path, move: Callable[[str, Path], None]) -> None:
        self.faults.at("move", str(target.relative_to(self.root)))
        super()._move(temporary, target, move)

    def _sync(self, folder: Path) -> None:
        self.faults.at("sync", str(folder.relative_to(self.root)))
        super()._sync(folder)

    def _discard(self, temporary: Path) -> None:
        if not self.faults.dead:
            super()._discard(temporary)
