"""The result file of one measurement: rows that fail separately, checks, and a deadline.

Nothing here uses a GPU; ``tests/unit/test_gpu_benchmark.py`` tests it.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from diffva_ray.progress import one_line

Values = dict[str, Any]
TOLD = (  # in the table at the end, the first of them that a row has
    "failed", "images_per_second", "best_of_ours_is_faster_by", "host_efficiency", "gpu_busy", "auroc", "map_distance",
    "grey_levels_apart_most", "unet_plain_relative_error", "unet_ours_relative_error", "waits_per_step", "first",
    "bitwise_the_same_in_both", "tflop_per_second_credited", "tflop_per_second", "ms", "host_ms", "kernels_and_copies",
    "gigabytes_per_second_read_and_written", "peak_gib", "seconds", "bytes",
)  # fmt: skip
LAST_WORDS = 15.0  # seconds after the deadline at which a process that hangs is ended from outside


class TooLong(BaseException):
    """Raised in the main thread when a row's time is over. Not an Exception, because libraries catch those."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TooLong in the main thread after ``seconds``."""

    def ring(*_: object) -> None:
        raise TooLong

    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    began, (theirs, _) = time.monotonic(), signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if theirs:  # whoever had set an alarm still gets it
            signal.setitimer(signal.ITIMER_REAL, max(theirs - time.monotonic() + began, 0.001))


class Book:
    """What has been measured, on disk after every row.

    ``shares`` are the sections' seconds, in their order; a section ends when its own and all earlier shares are used
    up, so what one leaves over the next ones have. ``release`` frees memory after every row.
    ``began``: of the deadline, now where not given.
    """

    def __init__(
        self,
        path: Path,
        seconds: float,
        shares: dict[str, float],
        about: Values,
        release: Callable[[], None] = lambda: None,
        began: float | None = None,
    ) -> None:
        self.path, self.seconds, self.release = path, seconds, release
        self.began = time.monotonic() if began is None else began
        self.ends, used, whole = {}, 0.0, sum(shares.values())
        for name, share in shares.items():
            used += share
            self.ends[name] = self.began + seconds * used / whole
        self.found: Values = {**about, "seconds_allowed": seconds, "finished": False, "sections": {}}
        self.at_end: list[Callable[[], None]] = []  # what is to be done where the process is ended from outside
        self._now: Values = {}
        self._end = self.began + seconds
        self._writing = threading.Lock()

    def left(self) -> float:
        """Return the seconds until the open section must end."""
        return self._end - time.monotonic()

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Rows and checks are of this section until the block ends. What goes wrong outside its rows ends the section,
        and no other one."""
        began = time.monotonic()
        self._now = self.found["sections"][name] = {"rows": [], "checks": [], "left_out": []}
        self._end = self.ends[name]
        click.echo(f"== {name}, {max(self.left(), 0):.0f} s")
        try:
            yield
        except Exception as error:
            self._now["failed"] = one_line(f"{type(error).__name__}: {error}", 300)
            click.echo(f"   {name} failed: {self._now['failed']}")
        finally:
            self._now["seconds"] = round(time.monotonic() - began, 1)
            self._end = self.began + self.seconds
            self.write()
            self.release()

    def row(
        self,
        name: str,
        work: Callable[[], Values | None],
        expected_seconds: float = 0.0,
        checked: bool = False,
        most: float = 1.0,
    ) -> Values | None:
        """Do ``work`` and keep the values it returns as a row; returns them, or None where there are none.

        Where less time is left than expected the row is left out, and named; so it is when it takes longer than
        ``most`` of the time that is left to the section. Where it fails the row has ``failed``, the reason.
        ``checked``: that it can be done at all is a check.
        """
        if self.left() <= expected_seconds:
            self.leave_out(name)
            return None
        began = time.monotonic()
        values: Values | None = None
        try:
            with time_limit(most * self.left()):
                values = work()
        except TooLong:
            self.leave_out(name, f"stopped after {time.monotonic() - began:.0f} s")
            return None
        except Exception as error:
            reason = "out of memory" if _is_out_of_memory(error) else f"{type(error).__name__}: {error}"
            self.keep({"name": name, "failed": one_line(reason, 300)})
            if checked:
                self.check(f"{name} runs", False, one_line(reason, 100), "no error")
            return None
        finally:
            self.release()
        if values is not None:
            self.keep({"name": name, **values, "row_seconds": round(time.monotonic() - began, 2)})
        return values

    def check(self, name: str, passed: bool, value: Any, limit: Any) -> None:
        """Record a condition that must hold; a failed one makes the command fail."""
        self._now["checks"].append({"name": name, "passed": bool(passed), "value": value, "limit": limit})
        click.echo(f"   {'ok    ' if passed else 'FAILED'} {name}: {value} (must be: {limit})")
        self.write()

    def leave_out(self, name: str, why: str = "no time left") -> None:
        self._now["left_out"].append(f"{name} ({why})")
        click.echo(f"   left out: {name} ({why})")
        self.write()

    def value(self, section: str, row: str, key: str) -> Any:
        """Return the result of an earlier row, or None."""
        rows = self.found["sections"].get(section, {}).get("rows", [])
        return next((one.get(key) for one in rows if one["name"] == row), None)

    def note(self, **values: Any) -> None:
        """Record values of the whole section."""
        self._now.update(values)
        self.write()

    def keep(self, row: Values) -> None:
        """Record a row that ``row`` did not measure."""
        self._now["rows"].append(row)
        click.echo(f"   {line_of(row)}")
        self.write()

    @property
    def failed_checks(self) -> list[str]:
        return [
            f"{name}: {check['name']}"
            for name, section in self.found["sections"].items()
            for check in section["checks"]
            if not check["passed"]
        ]

    def write(self, finished: bool = False) -> None:
        """Write the file atomically: to a temporary name, then moved into place."""
        with self._writing:
            self.found["finished"] = finished
            self.found["seconds_used"] = round(time.monotonic() - self.began, 1)
            self.found["failed_checks"] = self.failed_checks
            beside = self.path.with_name(f".{self.path.name}.tmp")
            beside.write_text(json.dumps(strict(self.found), indent=1, allow_nan=False) + "\n")
            beside.replace(self.path)

    def end_what_hangs(self) -> None:
        """Start a thread that ends the process soon after the deadline, even if C code hangs."""

        def end() -> None:
            time.sleep(max(self.began + self.seconds + LAST_WORDS - time.monotonic(), 0))
            for work in self.at_end:
                work()
            self.found["hung"] = "ended from outside after the deadline"
            self.write()
            print(self.table(), flush=True)
            os._exit(3)

        threading.Thread(target=end, daemon=True).start()

    def table(self) -> str:
        """Return rows, failed checks and skipped rows, one short line each."""
        lines = []
        for name, section in self.found["sections"].items():
            lines.append(f"== {name} ({section.get('seconds', '?')} s)")
            lines += [f"   {line}" for row in section["rows"] if (line := line_of(row, TOLD, 4))]
            held = sum(check["passed"] for check in section["checks"])
            lines += [f"   {held} of {len(section['checks'])} checks hold"] if section["checks"] else []
            lines += [
                f"   FAILED: {check['name']}: {check['value']} (must be: {check['limit']})"
                for check in section["checks"]
                if not check["passed"]
            ]
            lines += [f"   left out: {gap}" for gap in section["left_out"]]
            lines += [f"   {key}: {section[key]}" for key in ("failed",) if key in section]
        lines.append(f"failed checks: {', '.join(self.failed_checks) or 'none'}")
        return "\n".join(lines)


def strict(value: Any) -> Any:
    """With words for NaN and infinity, which JSON has no numbers for."""
    if isinstance(value, dict):
        return {key: strict(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def line_of(row: Values, keys: tuple[str, ...] | None = None, most: int = 99) -> str:
    """A row on one line, lists and what is long left out; of ``keys`` alone, and empty where it has none of them."""
    shown = [
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key in keys or row
        if key not in ("name", "row_seconds")
        and not isinstance(value := row.get(key), (list, dict))
        and value is not None
    ]
    return f"{row['name']}: {', '.join(shown[:most])}" if shown or keys is None else ""


def _is_out_of_memory(error: Exception) -> bool:
    """Recognise CUDA's own error, and those that cuBLAS and cuDNN raise as plain RuntimeErrors."""
    return type(error).__name__ == "OutOfMemoryError" or any(
        word in str(error) for word in ("out of memory", "ALLOC_FAILED")
    )
