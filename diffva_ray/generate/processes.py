"""Identifies the process that wrote a marker, and tells whether it is still running."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

HEARTBEAT = 60.0  # seconds between two signs of life of a process
MAX_SILENCE = 900.0  # seconds without one, after which a process of another host counts as dead


def this_process() -> dict[str, Any]:
    """Host, pid and start time of this process, as JSON values."""
    return {"host": _host(), "pid": os.getpid(), "started": _start_time(os.getpid())}


def is_running(process: Mapping[str, Any]) -> bool:
    """Whether a process that ``this_process`` described is running, paused included.

    On this host the kernel tells. For another host it is enough that the last ``beat`` (Unix time) is recent."""
    if process.get("host") != _host():
        beat = process.get("beat")
        return isinstance(beat, (int, float)) and time.time() - beat < MAX_SILENCE
    pid, started = process.get("pid"), process.get("started")
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:  # of another user
        pass
    except (OSError, OverflowError):
        return False
    return _start_time(pid) == started  # the number may belong to a later process


def _host() -> str:
    """The name of the host and, on Linux, its boot and the container's numbering of processes."""
    names = [socket.gethostname()]
    with suppress(OSError):
        names += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(names)


def _start_time(pid: int) -> str | None:
    """Start time in clock ticks since boot; "dead" for a process that has ended but is not reaped; None where the
    system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "dead" if fields[0] in "ZX" else fields[19]
