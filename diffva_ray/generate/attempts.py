"""Markers in ``attempts/`` that find poison records: records whose processing kills the worker process.

A worker writes a marker when an attempt at a shard starts and deletes it when the attempt ends, so a marker that is
left behind means that a worker died. From then on the micro-batches of that shard are processed one after the other,
each with its own marker while it is in progress, and one during which a worker died is halved until a single record
remains. A record during which workers keep dying is quarantined as ``killed_worker``; the others of the shard go on.

A marker counts only where the death of its worker is certain, never while its process is running or paused
(``generate/processes.py``). Under Ray the driver knows: markers count while their driver runs and their node is alive
(not preempted or lost). Without Ray the process is its own driver, so a record must have killed three processes while
it was the only one in progress. A record that completes clears its markers.

Lack of memory and an error of the GPU leave markers on purpose, which blame no record.
"""

from __future__ import annotations

import itertools
import json
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from diffva_ray.generate import processes
from diffva_ray.generate.run import part
from diffva_ray.storage.store import Store, StoreError

FOLDER = "attempts"
INLINE, RAY = "inline", "ray"
MAX_RECORD_DEATHS = {RAY: 2, INLINE: 3}  # worker deaths during one record, after which it is quarantined
MAX_SHARD_DEATHS = 20  # worker deaths on one shard under one driver: the cause is the machine, not an image
MAX_MEMORY_FAILURES = 3  # attempts at a shard that may run out of memory
MAX_SHARD_GPU_ERRORS = 3  # attempts at a shard that a GPU's error may end


class WorkersKeepDying(Exception):
    """Workers keep dying on one shard; the message is one line that says what to check."""


class OutOfMemory(Exception):
    """The device ran out of memory; the message is one line that says what to change."""


class GpuFailed(Exception):
    """A GPU or its driver reports an error; the message is one line that says what to do."""


@dataclass(frozen=True)
class Session:
    """One run of a driver process, as its workers know it."""

    executor: str = INLINE  # or RAY
    driver: str = field(default_factory=lambda: secrets.token_hex(6))  # random id of the driver process
    node: str = ""  # Ray's id of the worker's node
    alive: Callable[[str], bool] = lambda node: True  # whether a node is still in the cluster
    process: dict[str, Any] = field(default_factory=lambda: processes.this_process())

    def concerns(self, marker: Marker) -> bool:
        """Whether a marker that was left behind is of this executor and driver; see the module docstring."""
        if self.executor == INLINE:
            return marker.executor == INLINE
        return marker.driver == self.driver and self.alive(marker.node)


LEFT = ("memory", "device")  # kinds of markers that a living process leaves: out of memory, an error of the GPU


class Marker(NamedTuple):
    """The parts of a marker's file name."""

    kind: str  # "try": an attempt at a shard; "flight": a record in progress; "group": several; or a key of LEFT
    executor: str  # executor, driver and node of the Session
    driver: str
    node: str
    token: str  # random id of the attempt
    record: str  # record id of a "flight", "START-STOP" in the shard of a "group"; empty otherwise

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
        counted = [marker for marker in self.left_behind if session.concerns(marker) and self._is_left(marker)]
        self.marked = set[str]()  # paths of this attempt's markers
        self.changing = threading.Lock()
        self.ended = threading.Event()
        self.deaths = sum(marker.kind == "try" for marker in counted)
        self.short_of_memory = sum(marker.kind == "memory" for marker in counted)
        self.gpu_errors = sum(marker.kind == "device" for marker in counted)
        self.suspects = [_bounds(marker.record) for marker in counted if marker.kind == "group"]
        self.failure_counts = Counter(marker.record for marker in counted if marker.kind == "flight")

    @property
    def isolated(self) -> bool:
        """Whether records must be processed with markers, because a worker died on this shard before."""
        return self.deaths > 0

    def groups(self, total: int, micro_batch: int) -> list[range]:
        """Positions of the shard's ``total`` records to process together: micro-batches, halved where a worker died,
        and halved again; those in which most workers died come first."""
        bounds = {*range(0, total, micro_batch), total, *((start + stop) // 2 for start, stop in self.suspects)}
        ordered = sorted(bounds)
        groups = [range(start, stop) for start, stop in itertools.pairwise(ordered)]
        return sorted(groups, key=lambda group: -sum(start <= group[0] < stop for start, stop in self.suspects))

    @property
    def poison_records(self) -> set[str]:
        """Ids of the records that must not be processed again."""
        limit = MAX_RECORD_DEATHS[self.session.executor]
        return {record for record, deaths in self.failure_counts.items() if deaths >= limit}

    def __enter__(self) -> Attempt:
        lone = self.deaths - len(self.suspects)  # deaths that halve a group come on top
        if self.session.executor == RAY and (lone >= MAX_SHARD_DEATHS or self.deaths >= 3 * MAX_SHARD_DEATHS):
            suspects = ", ".join(sorted(self.failure_counts)[:3]) or "none in progress"
            raise WorkersKeepDying(
                f"{part(self.shard)}: {self.deaths} workers died on it, on {len(self.failure_counts)} different "
                f"records ({suspects}); that points to the machine (memory, GPU, driver), not to the images. All "
                "committed work is kept; the same command continues the run"
            )
        self._mark("try")
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Delete the attempt's marker: the process survived, whatever happened."""
        self.ended.set()
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

    @contextmanager
    def group_in_progress(self, group: range) -> Iterator[None]:
        """Mark several records while they are the only ones in progress."""
        name = f"{group.start}-{group.stop}"
        self._mark("group", name)
        try:
            yield
        finally:
            self._unmark("group", name)

    def leave(self, kind: str) -> None:
        """Leave a marker of LEFT for the next attempt; it counts against no record."""
        self._mark(kind)

    def clear(self) -> None:
        """Delete the markers of earlier attempts: the shard is committed."""
        for marker in self.left_behind:
            self.store.delete(f"{self.folder}/{marker.name}")

    def _marker(self, kind: str, record: str = "") -> str:
        session = self.session
        return f"{self.folder}/{Marker(kind, session.executor, session.driver, session.node, self.token, record).name}"

    def _mark(self, kind: str, record: str = "") -> None:
        with self.changing:
            self.marked.add(path := self._marker(kind, record))
            self._write(path)

    def _unmark(self, kind: str, record: str = "") -> None:
        with self.changing:
            self.marked.discard(path := self._marker(kind, record))
            self.store.delete(path)

    def _write(self, path: str) -> None:
        self.store.put(path, json.dumps({**self.session.process, "beat": time.time()}).encode())

    def _beat(self) -> None:
        """Write the markers again from time to time, as a sign of life for processes of other hosts."""
        while not self.ended.wait(processes.HEARTBEAT):
            with self.changing, suppress(StoreError):
                for path in self.marked:
                    self._write(path)

    def _is_left(self, marker: Marker) -> bool:
        """Whether the process of a marker has ended. A process leaves the marker of a failure behind on purpose."""
        if marker.kind in LEFT:
            return True
        try:
            process = json.loads(self.store.read(f"{self.folder}/{marker.name}"))
        except FileNotFoundError:
            return False  # deleted meanwhile
        except (OSError, ValueError):
            return True
        return not (isinstance(process, dict) and processes.is_running(process))


def _bounds(name: str) -> tuple[int, int]:
    start, _, stop = name.partition("-")
    return int(start), int(stop)
