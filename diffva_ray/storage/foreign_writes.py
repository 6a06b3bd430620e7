"""Failures of libraries that write local files themselves: every library has its own exceptions for a full disk."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffva_ray.progress import one_line
from diffva_ray.storage.store import StoreError

WRITE_FAILED = re.compile(r"space left|StorageFull|quota|read-only|os error|write failed|file write", re.IGNORECASE)


@contextmanager
def foreign_writes(folder: Path, what: str) -> Iterator[None]:
    """Turn the failure of a library to write ``what`` below ``folder`` into StoreError."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not WRITE_FAILED.search(str(error)):
            raise
        raise StoreError(
            f"{folder}: {what} cannot be written there ({one_line(error, 120)}); free some space (or set TMPDIR to "
            "another disk, if it is a temporary folder) and give the same command again",
            lasting=True,
        ) from error


def sync_tree(folder: Path) -> None:
    """Write the files of ``folder`` to the disk, so that they survive a power cut once their folder is renamed."""
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
