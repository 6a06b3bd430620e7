"""Markers in ``attempts/`` that find poison records: records whose processing kills the worker process.

A worker writes a marker when an attempt at a shard starts and deletes it when the attempt ends, so a marker that is
left behind means that a worker died. From then on the records of that shard are processed one by one, each with its
own marker while it is in progress. A record during which workers keep dying is quarantined as ``killed_worker``; the
other records of the shard go on.

A marker counts only where the death of its worker is certain. Under Ray the driver knows: markers count while their
driver runs and their node is alive (not preempted or lost). Without Ray the process is its own driver, so a record must
have killed three processes while it was the only one in progress. A record that completes clears its markers.
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
MAX_RECORD_DEATHS = {RAY: 2, INLINE: 3}  # worker deaths during one record, after which it is quarantined
MAX_SHARD_DEATHS = 20  # worker deaths on one shard under one driver: the cause is the machine, not an image
MAX_MEMORY_FAILURES = 3  # attempts at a shard that may run out of memory


class WorkersKeepDying(Exception):
    """Workers keep dying on one shard; the message is one line that says what to check."""


class OutOfMemory(Exception):
    """The device ran out of memory; the message is one line that says what to change."""


@dataclass(frozen=True)
class Session:
    """One run of a driver process, as its workers know it."""

    executor: str = INLINE  # or RAY
    driver: str = field(default_factory=lambda: secrets.token_hex(6))  # random id of the driver process
    node: str = ""  # Ray's id of the worker's node
    alive: Callable[[str], bool] = lambda node: True  # whether a node is still in the cluster

    def counts(self, marker: Marker) -> bool:
        """Whether a marker that was left behind counts as a worker's death; see the module docstring."""
        if self.executor == INLINE:
            return marker.executor == INLINE
        return marker.driver == self.driver and self.alive(marker.node)


class Marker(NamedTuple):
    """The parts of a marker's file name."""

    kind: str  # "try": an attempt at a shard; "flight": a record in progress; "memory": out of memory
    executor: str  # executor, driver and node of the Session
    driver: str
    node: str
    token: str  # random id of the attempt
    record: str  # record id of a "flight"; empty otherwise

    @property
    def name(self) -> str:
        return "~".join(self)


class Attempt:
    """One attempt at one shard: writes its own markers and counts those that earlier attempts left behind."""

    def __init__(self, store: Store, shard: int, session: Session) -> None:
        self.store, self.shard, self.session = store, shard, session
        self.folder = f"{FOLDER}/{part(shard)}"
        self.token = secrets.token_hex(4)
        self.left_behind = [
            Marker(*fields)
            for path, _ in store.list(self.folder)
            if len(fields := path.rpartition("/")[2].split("~")) == len(Marker._fields)
        ]
        counted = [marker for marker in self.left_behind if session.counts(marker)]
        self.deaths = sum(marker.kind == "try" for marker in counted)
        self.short_of_memory = sum(marker.kind == "memory" for marker in counted)
        self.failure_counts = Counter(marker.record for marker in counted if marker.kind == "flight")

    @property
    def isolated(self) -> bool:
        """Whether records must be processed one by one, because a worker died on this shard before."""
        return self.deaths > 0

    @property
    def poison_records(self) -> set[str]:
        """Ids of the records that must not be processed again."""
        limit = MAX_RECORD_DEATHS[self.session.executor]
        return {record for record, deaths in self.failure_counts.items() if deaths >= limit}

    def __enter__(self) -> Attempt:
        if self.session.executor == RAY and self.deaths >= MAX_SHARD_DEATHS:
            suspects = ", ".join(sorted(self.failure_counts)[:3]) or "none in progress"
            raise WorkersKeepDying(
                f"{part(self.shard)}: {self.deaths} workers died on it, on {len(self.failure_counts)} different "
                f"records ({suspects}); that points to the machine (memory, GPU, driver), not to the images. All "
                "committed work is kept; the same command continues the run"
            )
        self._mark("try")
        return self

    def __exit__(self, *exception: object) -> None:
        """Delete the attempt's marker: the process survived, whatever happened."""
        self._unmark("try")

    @contextmanager
    def in_progress(self, record: str) -> Iterator[None]:
        """Mark a record while it is the only one in progress; clear its earlier markers when it completes."""
        self._mark("flight", record)
        try:
            yield
        finally:
            self._unmark("flight", record)
        for marker in [marker for marker in self.left_behind if marker.record == record]:
            self.store.delete(f"{self.folder}/{marker.name}")
            self.left_behind.remove(marker)

    def ran_out_of_memory(self) -> None:
        """Leave a marker for the next attempt; it counts against no record."""
        self._mark("memory")

    def clear(self) -> None:
        """Delete the markers of earlier attempts: the shard is committed."""
        for marker in self.left_behind:
            self.store.delete(f"{self.folder}/{marker.name}")

    def _marker(self, kind: str, record: str = "") -> str:
        session = self.session
        return f"{self.folder}/{Marker(kind, session.executor, session.driver, session.node, self.token, record).name}"

    def _mark(self, kind: str, record: str = "") -> None:
        content = {"host": socket.gethostname(), "pid": os.getpid(), "record_id": record or None}
        self.store.put(self._marker(kind, record), json.dumps(content).encode())

    def _unmark(self, kind: str, record: str = "") -> None:
        self.store.delete(self._marker(kind, record))
