"""What a person sees while something runs: one line at a time, and Ray's own chatter only when it matters."""

from __future__ import annotations

import logging
import sys
import time

LOG = logging.getLogger("diffva")


def set_up_logging(verbose: bool = False) -> None:
    """Plain lines on stderr; called once by the command line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOG.handlers[:] = [handler]
    LOG.setLevel(logging.DEBUG if verbose else logging.INFO)
    LOG.propagate = False


def duration(seconds: float) -> str:
    """``75`` -> ``1m15s``."""
    seconds = round(seconds)
    hours, minutes, rest = seconds // 3600, seconds // 60 % 60, seconds % 60
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


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
