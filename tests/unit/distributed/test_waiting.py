"""On a joined cluster, a command says what it waits for."""

from __future__ import annotations

import logging
import threading

import pytest

from diffva_ray.distributed import session
from diffva_ray.progress import LOG


class Heard(logging.Handler):
    """Sets an event at each message."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.event = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        self.event.set()


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch):
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 4.0})
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 2.0})
    handler = Heard()
    LOG.addHandler(handler)
    level = LOG.level
    LOG.setLevel(logging.INFO)
    yield handler
    LOG.setLevel(level)
    LOG.removeHandler(handler)


def test_a_joined_cluster_that_is_full_is_told(heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with session.waiting("the first shard", {"GPU": 1.0}, lambda: False, interval=0.01):
        assert heard.event.wait(30)
    assert heard.lines[0] == "waiting for the first shard: a worker needs 1 GPU (0 of the cluster's 4 are free)"


def test_nothing_is_told_once_it_has_arrived(heard: Heard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    asked = threading.Event()

    def arrived() -> bool:
        asked.set()
        return True

    with session.waiting("the first shard", {"GPU": 1.0}, arrived, interval=0.01):
        assert asked.wait(30)
    assert heard.lines == []
