"""Limits how much memory threads use at the same time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition


class MemoryLimit:
    """Lets threads work on at most ``limit`` units (pixels, bytes) at a time; larger work runs alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0
        self._changed = Condition()

    @contextmanager
    def __call__(self, units: int) -> Iterator[None]:
        """Context in which the caller may use ``units``; waits until they are free."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken or self._taken + units <= self._limit)
            self._taken += units
        try:
            yield
        finally:
            with self._changed:
                self._taken -= units
                self._changed.notify_all()
