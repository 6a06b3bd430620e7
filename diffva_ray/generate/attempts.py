"""Which record kills its process: markers in ``attempts/`` that outlive a worker, and the verdict drawn from them.

An attempt at a shard leaves a marker while it lasts, so a marker found there is a worker that died. From then on the
records of that shard are worked on one by one, each with a marker of its own while it is in flight; a record in whose
flight workers keep dying is set aside as ``killed_worker``, and its neighbours go on.

A marker counts against a record only if somebody can tell that its worker died. Under Ray the driver can: markers
count while their driver runs and their node is there (not preempted or lost). Without Ray the process is its own
driver, so a record must have taken three of them down while it was alone in flight. A record that completes clears its
markers.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from diffva_ray.generate.run import part
from diffva_ray.storage.store import Store

FOLDER = "attempts"
INLINE, RAY = "inline", "ray"
DEATHS = {RAY: 2, INLINE: 3}  # in one record's flight, before it is set aside
MOST_DEATHS = 20  # of one driver's workers on one shard: that is no longer about single images
MOST_MEMORY = 3  # attempts that may run out of memory


class WorkersKeepDying(Exception):
    """A shard that no worker survives; the message is one line that says what to look at."""


class OutOfMemory(Exception):
    """The device ran out of memory; the message is one line that says what to change."""


@dataclass(frozen=True)
class Session:
    """One driver's life, as its workers know it. ``alive(node)``: whether a node is still in the cluster."""

    executor: str = INLINE
    driver: str = field(default_factory=lambda: secrets.token_hex(6))
    node: str = ""
    alive: Callable[[str], bool] = lambda node: True

    def counts(self, marker: Marker) -> bool:
        """Whether a marker that was left behind says anything: see the module's rule."""
        if self.executor == INLINE:
            return marker.executor == INLINE
        return marker.driver == self.driver and self.alive(marker.node)


class Marker(NamedTuple):
    """A marker's name, taken apart: what was going on, in which process, on which record."""

    kind: str  # try, flight, memory
    executor: str
    driver: str
    node: str
    token: str
    record: str

    @property
    def name(self) -> str:
        return "~".join(self)


class Attempt:
    """One attempt at one shard: what earlier ones left behind, and the markers of this one."""

    def __init__(self, store: Store, shard: int, session: Session) -> None:
        self.store, self.shard, self.session = store, shard, session
        self.folder = f"{FOLDER}/{part(shard)}"
        self.token = secrets.token_hex(4)
        self.found = [
            Marker(*fields)
            for path, _ in store.list(self.folder)
            if len(fields := path.rpartition("/")[2].split("~")) == len(Marker._fields)
        ]
        telling = [marker for marker in self.found if session.counts(marker)]
        self.deaths = sum(marker.kind == "try" for marker in telling)
        self.short_of_memory = sum(marker.kind == "memory" for marker in telling)
        self.blamed = Counter(marker.record for marker in telling if marker.kind == "flight")

    @property
    def isolated(self) -> bool:
        """Whether records must be worked on one by one: somebody died on this shard before."""
        return self.deaths > 0

    @property
    def killers(self) -> set[str]:
        """Records that are not to be touched again."""
        limit = DEATHS[self.session.executor]
        return {record for record, deaths in self.blamed.items() if deaths >= limit}

    def __enter__(self) -> Attempt:
        if self.session.executor == RAY and self.deaths >= MOST_DEATHS:
            suspects = ", ".join(sorted(self.blamed)[:3]) or "none in flight"
            raise WorkersKeepDying(
                f"{part(self.shard)}: {self.deaths} workers died on it, on {len(self.blamed)} different records "
                f"({suspects}); that points to the machine (memory, GPU, driver), not to the images. All committed "
                "work is kept, the same command goes on"
            )
        self._mark("try")
        return self

    def __exit__(self, *exception: object) -> None:
        """However the attempt ends, the process lived to see it."""
        self._unmark("try")

    @contextmanager
    def flight(self, record: str) -> Iterator[None]:
        """While a record is alone in flight."""
        self._mark("flight", record)
        try:
            yield
        finally:
            self._unmark("flight", record)
        for marker in [marker for marker in self.found if marker.record == record]:
            self.store.delete(f"{self.folder}/{marker.name}")
            self.found.remove(marker)

    def ran_out_of_memory(self) -> None:
        """Remember it for the next attempt; blames no record."""
        self._mark("memory")

    def settle(self) -> None:
        """The shard is committed: what was left behind here means nothing any more."""
        for marker in self.found:
            self.store.delete(f"{self.folder}/{marker.name}")

    def _marker(self, kind: str, record: str = "") -> str:
        session = self.session
        return f"{self.folder}/{Marker(kind, session.executor, session.driver, session.node, self.token, record).name}"

    def _mark(self, kind: str, record: str = "") -> None:
        about = {"host": socket.gethostname(), "pid": os.getpid(), "record_id": record or None}
        self.store.put(self._marker(kind, record), json.dumps(about).encode())

    def _unmark(self, kind: str, record: str = "") -> None:
        self.store.delete(self._marker(kind, record))
