"""File storage: a local folder or an ``s3://`` prefix behind one small interface, ``Store``.

The commit protocol relies on two guarantees: ``put`` makes a file visible whole or not at all, and ``put_if_absent``
never replaces an existing file. A problem of one file raises Python's own OSError (FileNotFoundError, PermissionError
...). A problem of the whole store raises StoreError, so that a full disk is never mistaken for a bad image.
"""

from __future__ import annotations

import errno
import io
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol, TypeVar

from diffva_ray.progress import LOG


class StoreError(Exception):
    """Raised when a store cannot be used now: full, read-only, no credentials, no answer. Committed files are kept.

    The message is one line that names the store and what to do. ``lasting``: a retry within seconds would not help.
    """

    def __init__(self, message: str, lasting: bool = False) -> None:
        super().__init__(message)
        self.lasting = lasting


class Entry(NamedTuple):
    """A listed file."""

    path: str  # relative to the store
    size: int  # in bytes


class Store(Protocol):
    """Interface of a folder of files. Paths are relative with forward slashes; ``put`` creates parent folders.

    Every method raises StoreError when the store fails, and ValueError for a path that leaves the folder.
    """

    uri: str  # address without a trailing slash

    def read(self, path: str) -> bytes:
        """Read a whole file.

        Raises:
            FileNotFoundError: There is no such file.
            OSError: This file cannot be read, for example for lack of permission.
        """

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Read a part of a file.

        Args:
            path: The file.
            start: Offset of the first byte.
            stop: Offset after the last byte.

        Returns:
            ``stop - start`` bytes, or fewer at the end of the file.

        Raises:
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


def checked(path: str) -> str:
    """Return ``path`` if it stays inside the store. Raises ValueError for absolute paths, ``..`` and NUL characters."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\0" in path:
        raise ValueError(f"path leaves its folder: {path!r}")
    return path


# errno values that concern a single file; any other error means that the store is unavailable.
FILE_ERRORS = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL,
)  # fmt: skip
LASTING = {  # errors that a retry does not fix
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission to write there",
    errno.EPERM: "no permission to write there",
    errno.ENOTDIR: "a file is in the way of a folder",
}
TEMPORARY = ".tmp-"
SYSTEM_FOLDERS = ("lost+found", ".Trashes", ".snapshot", "System Volume Information")  # at the top of a disk
MAX_WRITE_SECONDS = 3600.0  # a temporary file that is older has lost its writer


class LocalStore:
    """A folder of a local (or mounted) file system."""

    def __init__(self, uri: str) -> None:
        self.root = Path(uri).expanduser().absolute()
        self.uri = str(self.root)

    def read(self, path: str) -> bytes:
        with self._reading(path):
            return (self.root / checked(path)).read_bytes()

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        with self._reading(path), open(self.root / checked(path), "rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def exists(self, path: str) -> bool:
        return (self.root / checked(path)).is_file()

    def list(self, prefix: str = "") -> list[Entry]:
        # Walk the folders once each, links included.
        top = self.root / checked(prefix)
        entries, visited = [], set()
        for folder, folders, names in os.walk(top, onerror=self._unlisted, followlinks=True):
            real = os.path.realpath(folder)
            if real in visited or f"{os.path.realpath(os.path.dirname(folder))}/".startswith(f"{real}/"):
                folders.clear()  # a loop of links, or a link to a folder that holds it
                if real in visited or os.path.islink(folder):
                    continue
            visited.add(real)
            for name in names:
                file = os.path.join(folder, name)
                if name.startswith(TEMPORARY):
                    continue
                try:
                    info = os.stat(file)
                except OSError as error:  # for example a folder that may be listed but not entered
                    self._unlisted(error)
                    continue
                if stat.S_ISREG(info.st_mode):
                    entries.append(Entry(os.path.relpath(file, self.root).replace(os.sep, "/"), info.st_size))
        return sorted(entries)

    def _unlisted(self, error: OSError) -> None:
        """Raise StoreError for what cannot be listed, so that no class disappears silently. Ignores files deleted
        meanwhile, dangling links and system folders of a disk."""
        name = os.path.basename(str(error.filename or ""))
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP) and name not in SYSTEM_FOLDERS:
            raise StoreError(
                f"{error.filename or self.root} cannot be listed: {error.strerror or error}; fix its permissions or "
                "move it out of the folder",
                lasting=error.errno in (errno.EACCES, errno.EPERM),
            ) from error

    def put(self, path: str, data: bytes) -> None:
        with self._writing(path):
            self._publish(self.root / checked(path), data, os.replace)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        target = self.root / checked(path)
        if target.exists():
            return False
        try:
            with self._writing(path):
                self._publish(target, data, _link_or_create)
        except FileExistsError:
            return False
        return True

    def delete(self, path: str) -> None:
        with self._writing(path):
            (self.root / checked(path)).unlink(missing_ok=True)

    def sweep(self) -> int:
        removed = 0
        for folder, _, names in os.walk(self.root):
            for file in (Path(folder, name) for name in names if name.startswith(TEMPORARY)):
                with suppress(FileNotFoundError):  # its writer has just renamed it
                    if file.stat().st_mtime < time.time() - MAX_WRITE_SECONDS:
                        file.unlink()
                        removed += 1
        return removed

    def local_folder(self) -> Path:
        return self.root

    @contextmanager
    def _reading(self, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in FILE_ERRORS:
                raise
            raise StoreError(f"{self.root / path} cannot be read: {error.strerror or error}") from error

    @contextmanager
    def _writing(self, path: str) -> Iterator[None]:
        try:
            yield
        except FileExistsError:
            raise
        except OSError as error:
            reason = LASTING.get(error.errno or 0)
            raise StoreError(
                f"{self.root / path} cannot be written: {reason or error.strerror or error}", lasting=reason is not None
            ) from error

    def _publish(self, target: Path, data: bytes, move: Callable[[str, Path], None]) -> None:
        """Write a temporary file beside the target, fsync, move it, fsync the folder: atomic even after a power cut."""
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:  # a file in place of the folder, not an existing target
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", error.filename) from error
        temporary = target.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
        try:
            self._write(temporary, data)
            self._move(temporary, target, move)
            self._sync(target.parent)
        finally:
            self._discard(temporary)

    # One method per step: the chaos suite injects failures between any two of them.
    def _write(self, temporary: Path, data: bytes) -> None:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def _move(self, temporary: Path, target: Path, move: Callable[[str, Path], None]) -> None:
        move(str(temporary), target)

    def _sync(self, folder: Path) -> None:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def _discard(self, temporary: Path) -> None:
        temporary.unlink(missing_ok=True)


def _link_or_create(temporary: str, target: Path) -> None:
    """Hard-link the file, which is atomic and raises FileExistsError; rename it where there are no hard links."""
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
            raise
        os.replace(temporary, target)


def _s3(uri: str) -> Store:
    from diffva_ray.storage.s3 import S3Store  # loads clients that a local run does not need

    return S3Store(uri)


STORES: dict[str, Callable[[str], Store]] = {  # by scheme; a store that loads a client has a function like _s3
    "": LocalStore,
    "s3": _s3,
}


class UnknownScheme(ValueError):
    """Raised for an address that no store can open; the message is one line that names it."""


def open_store(uri: str | os.PathLike[str]) -> Store:
    """Open the store at an address. Nothing is created or read.

    Args:
        uri: A local folder, or an address of a scheme in STORES, such as ``s3://bucket/prefix``.

    Returns:
        The store.

    Raises:
        UnknownScheme: No store has this scheme, or the address is malformed.
    """
    text = os.fspath(uri)
    scheme = "" if is_local(text) else text.partition("://")[0]
    if scheme not in STORES:
        schemes = ", ".join(f"{name}://" for name in STORES if name)
        raise UnknownScheme(f"{text}: unknown scheme {scheme!r}; use a local path or {schemes}")
    return STORES[scheme](text)


def is_local(uri: str) -> bool:
    """Return whether an address is a path on this machine or on a mounted file system."""
    return "://" not in uri


def absolute(uri: str) -> str:
    """Make a local path absolute, because workers run in other folders; returns other addresses unchanged."""
    return str(Path(uri).expanduser().absolute()) if is_local(uri) else uri


@lru_cache(maxsize=16)
def opened(uri: str) -> Store:
    """Cached ``open_store`` for loops over many files: creates the client of a store once. Raises UnknownScheme."""
    return open_store(uri)


def open_file(uri: str | os.PathLike[str]) -> tuple[Store, str]:
    """Open the store of the folder that contains the file at ``uri``.

    Returns:
        The store of the folder, and the file's name in it.

    Raises:
        UnknownScheme: As ``open_store``.
    """
    folder, slash, name = os.fspath(uri).rpartition("/")
    return open_store(folder or slash or "."), name


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
