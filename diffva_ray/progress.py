"""Log lines, progress messages and a stopwatch."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

LOG = logging.getLogger("diffva")


class _Printable(logging.Formatter):
    """Formats plain lines without escape sequences, which labels and file names may contain."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def set_up_logging(verbose: bool = False) -> None:
    """Log plain lines to stderr; the command line calls this once. ``verbose``: also debug messages and tracebacks."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable("%(message)s"))
    LOG.handlers[:] = [handler]
    LOG.setLevel(logging.DEBUG if verbose else logging.INFO)
    LOG.propagate = False


def printable(text: str) -> str:
    """Replace characters that a terminal would execute by ``?``; keeps line ends and tabs."""
    return "".join(char if char.isprintable() or char in "\n\t" else "?" for char in text)


def one_line(message: str | BaseException, length: int = 300) -> str:
    """Convert a text or an error (its type if it has no text) to one line of at most ``length`` printable characters.

    Error texts may quote damaged files: Parquet refuses lone surrogates, and terminals execute escape sequences.
    """
    text = " ".join(str(message).split())
    if not text and isinstance(message, BaseException):
        text = type(message).__name__
    return printable(text)[:length]


def duration(seconds: float) -> str:
    """Format seconds: ``75`` -> ``1m15s``."""
    seconds = round(seconds)
    hours, minutes, rest = seconds // 3600, seconds // 60 % 60, seconds % 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    if minutes:
        return f"{minutes}m{rest:02d}s"
    return f"{rest}s"


class Progress:
    """Log the progress of a task, its rate and the remaining time, at most every ``interval`` seconds."""

    def __init__(self, what: str, total: int, unit: str, done: int = 0, interval: float = 5.0) -> None:
        self.what, self.total, self.unit, self.interval = what, total, unit, interval
        self.first = done
        self.started = self.last_logged = time.monotonic()

    def update(self, done: int, note: str = "") -> None:
        """Report that ``done`` units are done in total."""
        now = time.monotonic()
        if now - self.last_logged >= self.interval or done >= self.total:
            self.last_logged = now
            elapsed = max(now - self.started, 1e-6)
            rate = (done - self.first) / elapsed
            left = f", {duration((self.total - done) / rate)} to go" if rate > 0 and done < self.total else ""
            LOG.info(
                "%s %d of %d %s, %.1f/s, %s%s%s",
                self.what, done, self.total, self.unit, rate, duration(elapsed), left, f" ({note})" if note else "",
            )  # fmt: skip


class Stopwatch:
    """Measure the seconds that one thread spends in each stage; a nested stage counts for itself only.

    ``settle`` (for example ``torch.cuda.synchronize``) runs at every stage boundary, because GPU work is asynchronous.
    """

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

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add the seconds of another stopwatch."""
        for stage, value in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + value

    def _charge(self) -> None:
        self._settle()
        now = time.perf_counter()
        if self._stages:
            self.seconds[self._stages[-1]] = self.seconds.get(self._stages[-1], 0.0) + now - self._since
        self._since = now
