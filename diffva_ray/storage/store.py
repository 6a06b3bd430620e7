"""File storage: a local folder or an ``s3://`` prefix behind one small interface, ``Store``.

The commit protocol relies on two guarantees: ``put`` makes a file visible whole or not at all, and ``put_if_absent``
never replaces an existing file. A problem of one file raises Python's own OSError (FileNotFoundError, PermissionError
...). A problem of the whole store raises StoreError, so that a full disk is never mistaken for a bad image.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol, TypeVar

from diffva_ray.progress import LOG


class StoreError(Exception):
    """Raised when a store cannot be used now: full, read-only, no credentials, no answer. Committed files are kept.

    The message is one line that names the store and what to do. ``lasting``: a retry within seconds would not help.
    """

    def __init__(self, message: str, lasting: bool = False) -> None:
        super().__init__(message)
        self.lasting = lasting


class Modified(Exception):
    """Raised for a file that was written after the given time."""


class Entry(NamedTuple):
    """A listed file."""

    path: str  # relative to the store
    size: int  # in bytes


class Store(Protocol):
    """Interface of a folder of files. Paths are relative with forward slashes; ``put`` creates parent folders.

    Every method raises StoreError when the store fails, and ValueError for a path that leaves the folder.
    """

    uri: str  # address without a trailing slash

    def read(self, path: str, unmodified_since: float | None = None) -> bytes:
        """Read a whole file.

        Args:
            path: The file.
            unmodified_since: Unix time after which the file must not have been written; a store that does not know
                may ignore it.

        Returns:
            The content.

        Raises:
            Modified: The file was written after ``unmodified_since``.
            FileNotFoundError: There is no such file.
            OSError: This file cannot be read, for example for lack of permission.
        """

    def read_range(self, path: str, start: int, stop: int, unmodified_since: float | None = None) -> bytes:
        """Read a part of a file.

        Args:
            path: The file.
            start: Offset of the first byte.
            stop: Offset after the last byte.
            unmodified_since: As ``read``.

        Returns:
            ``stop - start`` bytes, or fewer at the end of the file.

        Raises:
            Modified: As ``read``.
            OSError: As ``read``.
        """

    def exists(self, path: str) -> bool:
        """Return whether there is a file at ``path``; a folder is no file."""

    def list(self, prefix: str = "") -> list[Entry]:
        """List all files below the folder ``prefix`` (empty: the whole store), recursively.

        Returns:
            The files, sorted by path; an empty list for a folder that does not exist.
        """

    def put(self, path: str, data: bytes) -> None:
        """Write a file whole or not at all; replaces an existing file."""

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Write a file unless it exists.

        Returns:
            True if the file was written, False if it existed; an existing file is not changed.
        """

    def delete(self, path: str) -> None:
        """Remove a file; does nothing if there is none."""

    def sweep(self) -> int:
        """Remove temporary files of writers that were killed over an hour ago; returns their number."""

    def local_folder(self) -> Path:
        """Return the store as a local folder, for libraries that need one: the folder itself, or a private download."""


class Ranges(io.RawIOBase):
    """Seekable view of a stored file of ``size`` bytes, which fetches only the ranges that are read."""

    def __init__(self, store: Store, path: str, size: int) -> None:
        super().__init__()
        self.store, self.path, self.size, self.position = store, path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def read(self, size: int = -1) -> bytes:
        stop = self.size if size < 0 else min(self.position + size, self.size)
        data = self.store.read_range(self.path, self.position, stop) if stop > self.position else b""
        self.position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def checked(path: str) -> str:
    """Return ``path`` if it stays inside the store. Raises ValueError for absolute paths, ``..`` and NUL characters."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\0" in path:
        raise ValueError(f"path leaves its folder: {path!r}")
    return path


class UnknownScheme(ValueError):
    """Raised for an address that no store can open; the message is one line that names it."""


def is_local(uri: str) -> bool:
    """Return whether an address is a path on this machine or on a mounted file system."""
    return "://" not in uri


def absolute(uri: str) -> str:
    """Make a local path absolute, because workers run in other folders; returns other addresses unchanged."""
    return str(Path(uri).expanduser().absolute()) if is_local(uri) else uri


PAUSES = (1.0, 5.0)  # seconds before each retry after a failure of the store
Result = TypeVar("Result")


def patiently(work: Callable[[], Result]) -> Result:
    """Return ``work()``; retry after a pause when the store fails. Raises StoreError for a lasting failure, or when all
    attempts fail."""
    for pause in PAUSES:
        try:
            return work()
        except StoreError as error:
            if error.lasting:
                raise
            LOG.info("%s; retrying in %g s", error, pause)
            time.sleep(pause)
    return work()


def join(uri: str, *parts: str) -> str:
    """Append path parts to an address, local or s3://."""
    return "/".join([uri.rstrip("/"), *parts])
