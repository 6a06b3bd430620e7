"""What a person sees while something runs: one line at a time, and Ray's own chatter only when it matters."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOG = logging.getLogger("diffva")


def set_up_logging(verbose: bool = False) -> None:
    """Plain lines on stderr; called once by the command line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOG.handlers[:] = [handler]
    LOG.setLevel(logging.DEBUG if verbose else logging.INFO)
    LOG.propagate = False


def one_line(said: str | BaseException, length: int = 300) -> str:
    """A text, or an error's (its kind where it says nothing), as one line of at most ``length`` printable characters,
    whatever a library quotes from a damaged file: a lone surrogate, say, cannot be written to Parquet, and an escape
    sequence acts on the terminal that shows it."""
    text = " ".join(str(said).split())
    if not text and isinstance(said, BaseException):
        text = type(said).__name__
    return "".join(char if char.isprintable() else "?" for char in text)[:length]


def duration(seconds: float) -> str:
    """``75`` -> ``1m15s``."""
    seconds = round(seconds)
    hours, minutes, rest = seconds // 3600, seconds // 60 % 60, seconds % 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    if minutes:
        return f"{minutes}m{rest:02d}s"
    return f"{rest}s"


class Progress:
    """Done of total with rate and time to go, said at most every ``interval`` seconds."""

    def __init__(self, what: str, total: int, unit: str, done: int = 0, interval: float = 5.0) -> None:
        self.what, self.total, self.unit, self.interval = what, total, unit, interval
        self.done, self.first = done, done
        self.started = self.said = time.monotonic()

    def update(self, done: int, note: str = "") -> None:
        """``done`` units are done by now."""
        self.done = done
        now = time.monotonic()
        if now - self.said >= self.interval or done >= self.total:
            self.said = now
            elapsed = max(now - self.started, 1e-6)
            rate = (done - self.first) / elapsed
            left = f", {duration((self.total - done) / rate)} to go" if rate > 0 and done < self.total else ""
            LOG.info(
                "%s %d of %d %s, %.1f/s, %s%s%s",
                self.what, done, self.total, self.unit, rate, duration(elapsed), left, f" ({note})" if note else "",
            )  # fmt: skip


class Stopwatch:
    """Seconds by stage of one thread's work; of a stage within another, each counts its own. ``settle`` is waited for
    where one ends and the next begins: a GPU works on after it was told to."""

    def __init__(self, settle: Callable[[], None] = lambda: None) -> None:
        self.seconds: dict[str, float] = {}
        self._settle, self._stages, self._since = settle, list[str](), 0.0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._charge()
        self._stages.append(stage)
        try:
            yield
        finally:
            self._charge()
            self._stages.pop()

    def _charge(self) -> None:
        self._settle()
        now = time.perf_counter()
        if self._stages:
            self.seconds[self._stages[-1]] = self.seconds.get(self._stages[-1], 0.0) + now - self._since
        self._since = now
