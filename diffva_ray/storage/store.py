"""Where files are: a folder on a local disk or under ``s3://``, behind one small interface.

Nothing else in the package knows the difference. Two promises matter to the commit protocol: ``put`` makes a file
visible whole or not at all, and ``put_if_absent`` never replaces a file that is there.

What is wrong with one file is an OSError of Python's own (FileNotFoundError, PermissionError ...); what is wrong with
the store as a whole is a StoreError, so that a full disk is never taken for a bad image.
"""

from __future__ import annotations

import errno
import importlib
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
    """A store that cannot be used now: full, read-only, no credentials, no answer. The message is one line that names
    it and what to do; nothing committed is lost. ``lasting``: trying again soon would not help."""

    def __init__(self, message: str, lasting: bool = False) -> None:
        super().__init__(message)
        self.lasting = lasting


class Entry(NamedTuple):
    """One listed file: its path relative to the store, and its size in bytes."""

    path: str
    size: int


class Store(Protocol):
    """A folder. Paths are relative, with forward slashes; parents appear by themselves."""

    uri: str

    def read(self, path: str) -> bytes:
        """The whole file. Raises FileNotFoundError when there is none, another OSError when this file cannot be read,
        StoreError when the store fails."""

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """The bytes from ``start`` to before ``stop`` of a file (fewer where it ends); raises as ``read``."""

    def exists(self, path: str) -> bool: ...

    def list(self, prefix: str = "") -> list[Entry]:
        """All files below the folder ``prefix`` (recursively), sorted by path; empty when there is none. Raises
        StoreError when a folder cannot be looked into."""

    def put(self, path: str, data: bytes) -> None:
        """Write a file whole or not at all, replacing what is there."""

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Write a file unless one is there; False when one was (its bytes stay)."""

    def delete(self, path: str) -> None:
        """Remove one file; nothing happens when it is absent."""

    def sweep(self) -> int:
        """Remove what writers killed in the middle of a ``put`` left behind, once it is an hour old; how many."""

    def local_folder(self) -> Path:
        """The store as a local folder (for libraries that need one): itself, or a private download."""


class Ranges(io.RawIOBase):
    """A stored file of ``size`` bytes to read from without fetching it all."""

    def __init__(self, store: Store, path: str, size: int) -> None:
        super().__init__()
        self.store, self.path, self.size, self.at = store, path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def read(self, size: int = -1) -> bytes:
        stop = self.size if size < 0 else min(self.at + size, self.size)
        data = self.store.read_range(self.path, self.at, stop) if stop > self.at else b""
        self.at += len(data)
        return data


def checked(path: str) -> str:
    """``path`` when it stays inside the store; ValueError for absolute paths and ``..``."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\0" in path:
        raise ValueError(f"path leaves its folder: {path!r}")
    return path


# What an operating system says of one file; everything else is said of the store.
OF_THE_FILE = (
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL,
)  # fmt: skip
LASTING = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission to write there",
    errno.EPERM: "no permission to write there",
    errno.ENOTDIR: "a file is in the way of a folder",
}
TEMPORARY = ".tmp-"
OF_THE_SYSTEM = ("lost+found", ".Trashes", ".snapshot", "System Volume Information")  # at the top of a disk
ORPHANED = 3600.0  # seconds after which a temporary file has no writer any more


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
                    about = os.stat(file)
                except OSError as error:  # a folder that may be listed and not entered, for one
                    self._unlisted(error)
                    continue
                if stat.S_ISREG(about.st_mode):
                    entries.append(Entry(os.path.relpath(file, self.root).replace(os.sep, "/"), about.st_size))
        return sorted(entries)

    def _unlisted(self, error: OSError) -> None:
        """Raises StoreError for what a listing could not look into: a class that silently vanishes is worse than none.
        What was deleted since, links that lead nowhere and a disk's own folders are no entries."""
        name = os.path.basename(str(error.filename or ""))
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP) and name not in OF_THE_SYSTEM:
            raise StoreError(
                f"{error.filename or self.root} cannot be listed: {error.strerror or error}; mend that, or take it out "
                "of the folder",
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
                with suppress(FileNotFoundError):  # another writer's, which has its own name by now
                    if file.stat().st_mtime < time.time() - ORPHANED:
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
            if error.errno in OF_THE_FILE:
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
        """tmp beside the target, fsync, move, fsync of the folder: whole or not at all, also after a power cut."""
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:  # of a file where the folder should be; not to be taken for the target's
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", error.filename) from error
        temporary = target.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
        try:
            self._write(temporary, data)
            self._move(temporary, target, move)
            self._sync(target.parent)
        finally:
            self._discard(temporary)

    # The steps of a publication, one method each: the chaos suite fails, tears and stops between any two of them.
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
    """A hard link is atomic and fails when the name is taken; where links are refused, rename after a last look."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
            raise
        os.replace(temporary, target)


def _when_opened(place: str) -> Callable[[str], Store]:
    """The class at ``module:class``, imported with the first address of its kind: a local run needs neither a client's
    import time nor its credentials."""
    module, _, name = place.partition(":")
    return lambda uri: getattr(importlib.import_module(module), name)(uri)


STORES: dict[str, Callable[[str], Store]] = {  # by scheme; a new kind is a module with a Store, and a line here
    "": LocalStore,
    "s3": _when_opened("diffva_ray.storage.s3:S3Store"),
}


class UnknownScheme(ValueError):
    """An address that no kind of store is for; the message is one line that names it."""


def open_store(uri: str | os.PathLike[str]) -> Store:
    """The store at ``uri``: a local path, or an address of one of STORES such as ``s3://bucket/prefix``. Raises
    UnknownScheme."""
    text = os.fspath(uri)
    scheme = "" if is_local(text) else text.partition("://")[0]
    if scheme not in STORES:
        known = ", ".join(f"{name}://" for name in STORES if name)
        raise UnknownScheme(f"{text}: unknown scheme {scheme!r}; use a local path or {known}")
    return STORES[scheme](text)


def is_local(uri: str) -> bool:
    """Whether an address is a path, of this machine or of a file system mounted on it."""
    return "://" not in uri


def absolute(uri: str) -> str:
    """An address that does not depend on the folder a command was given in: workers run in folders of their own."""
    return str(Path(uri).expanduser().absolute()) if is_local(uri) else uri


@lru_cache(maxsize=16)
def opened(uri: str) -> Store:
    """``open_store``, for loops over many files: a store's client is made once. Raises UnknownScheme."""
    return open_store(uri)


def open_file(uri: str | os.PathLike[str]) -> tuple[Store, str]:
    """The store of the folder that holds the file at ``uri``, and the file's name there. Raises UnknownScheme."""
    folder, slash, name = os.fspath(uri).rpartition("/")
    return open_store(folder or slash or "."), name


PAUSES = (1.0, 5.0)  # seconds before work is tried again when its storage failed
Result = TypeVar("Result")


def patiently(work: Callable[[], Result]) -> Result:
    """``work()``, tried again after a pause when the storage fails. Raises StoreError when it goes on failing, or at
    once when trying again would not help."""
    for pause in PAUSES:
        try:
            return work()
        except StoreError as error:
            if error.lasting:
                raise
            LOG.info("%s; trying again in %g s", error, pause)
            time.sleep(pause)
    return work()


def join(uri: str, *parts: str) -> str:
    """``uri`` with path parts below it, for local paths and s3:// alike."""
    return "/".join([uri.rstrip("/"), *parts])
