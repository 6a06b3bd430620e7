"""A local store that fails, tears, delays and stops the process between any two steps, reproducibly.

What happens at a step follows from (seed, life, step, path, number of earlier calls), never from timing or thread
order, so a seed repeats its history.
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
from typing import Any

from diffva_ray.generate.processes import this_process
from diffva_ray.storage.local import LocalStore
from diffva_ray.storage.store import Entry

RANDOM = re.compile(r"~[0-9a-f]*~[^~]*~[0-9a-f]*~|\.tmp-[0-9a-f]+")  # the random part of markers and temporary files

NO_PROCESS = 1 << 29  # more than any kernel numbers


class Stopped(BaseException):
    """The process has ended: nothing may touch the store after this, not even a ``finally`` block."""


@dataclass
class Faults:
    """The faults of one history. A life is one process; after ``lives`` of them there are no more faults."""

    seed: int
    stop: float = 0.006  # probability that the process ends at a step
    fail: float = 0.006  # probability that a step raises an OSError
    tear: float = 0.02  # probability that only half of a file is written
    delay: float = 0.01  # probability that a step is delayed
    lives: int = 6  # number of lives with faults
    life: int = 0  # number of the current life, from 1
    dead: bool = False  # whether the current life has ended
    seen: Counter[str] = field(default_factory=Counter)  # calls of each step in this life
    counts: Counter[str] = field(default_factory=Counter)  # faults that happened
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self) -> None:
        self.life += 1
        self.dead = False
        self.seen.clear()

    def process(self) -> dict[str, Any]:
        """What ``processes.this_process`` says in a life: a process that no longer runs when the next one begins."""
        return {**this_process(), "pid": NO_PROCESS + self.life}

    def _random(self, step: str, path: str) -> float:
        key = f"{step} {RANDOM.sub('~', path)}"
        with self.lock:
            self.seen[key] += 1
            key = f"{self.seed} {self.life} {key} {self.seen[key]}"
        return int(hashlib.sha256(key.encode()).hexdigest()[:13], 16) / 16**13

    def at(self, step: str, path: str) -> None:
        """Continue, wait, fail or end, before a step."""
        if self.dead:
            raise Stopped
        if self.life > self.lives:
            return
        number = self._random(step, path)
        if number < self.stop:
            self.die()
        elif number < self.stop + self.fail:
            self.counts["failures"] += 1
            raise OSError(errno.EIO, "input/output error (injected)")
        elif number < self.stop + self.fail + self.delay:
            self.counts["delays"] += 1
            time.sleep(0.001)

    def torn(self, path: str) -> bool:
        """Return whether only half of a file is written before the process ends."""
        if self.dead or self.life > self.lives or self._random("tear", path) >= self.tear:
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

    def read(self, path: str, unmodified_since: float | None = None) -> bytes:
        with self._reading(path):
            self.faults.at("read", path)
        return super().read(path, unmodified_since)

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
