"""Where files are: a folder on a local disk or under ``s3://``, behind one small interface.

Nothing else in the package knows the difference. Two promises matter to the commit protocol: ``put`` makes a file
visible whole or not at all, and ``put_if_absent`` never replaces a file that is there.
"""

from __future__ import annotations

import errno
import os
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol


class Entry(NamedTuple):
    """One listed file: its path relative to the store, and its size in bytes."""

    path: str
    size: int


class Store(Protocol):
    """A folder. Paths are relative, with forward slashes; parents appear by themselves."""

    uri: str

    def read(self, path: str) -> bytes:
        """The whole file. Raises FileNotFoundError when there is none, OSError when it cannot be read."""

    def exists(self, path: str) -> bool: ...

    def list(self, prefix: str = "") -> list[Entry]:
        """All files below the folder ``prefix`` (recursively), sorted by path; empty when there is none."""

    def put(self, path: str, data: bytes) -> None:
        """Write a file whole or not at all, replacing what is there."""

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """Write a file unless one is there; False when one was (its bytes stay)."""

    def delete(self, path: str) -> None:
        """Remove one file; nothing happens when it is absent."""

    def local_folder(self) -> Path:
        """The store as a local folder (for libraries that need one): itself, or a private download."""


def checked(path: str) -> str:
    """``path`` when it stays inside the store; ValueError for absolute paths and ``..``."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\0" in path:
        raise ValueError(f"path leaves its folder: {path!r}")
    return path


class LocalStore:
    """A folder of a local (or mounted) file system."""

    def __init__(self, uri: str) -> None:
        self.root = Path(uri).expanduser().absolute()
        self.uri = str(self.root)

    def read(self, path: str) -> bytes:
        return (self.root / checked(path)).read_bytes()

    def exists(self, path: str) -> bool:
        return (self.root / checked(path)).is_file()

    def list(self, prefix: str = "") -> list[Entry]:
        top = self.root / checked(prefix)
        entries, visited = [], set()
        for folder, folders, names in os.walk(top, followlinks=True):
            real = os.path.realpath(folder)
            if real in visited or f"{os.path.realpath(os.path.dirname(folder))}/".startswith(f"{real}/"):
                folders.clear()  # a loop of links, or a link to a folder that holds it
                if real in visited or os.path.islink(folder):
                    continue
            visited.add(real)
            for name in names:
                file = os.path.join(folder, name)
                if name.startswith(TEMPORARY) or not os.path.isfile(file):
                    continue
                entries.append(Entry(os.path.relpath(file, self.root).replace(os.sep, "/"), os.path.getsize(file)))
        return sorted(entries)

    def put(self, path: str, data: bytes) -> None:
        target = self.root / checked(path)
        self._publish(target, data, os.replace)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        target = self.root / checked(path)
        if target.exists():
            return False
        try:
            self._publish(target, data, _link_or_create)
        except FileExistsError:
            return False
        return True

    def delete(self, path: str) -> None:
        (self.root / checked(path)).unlink(missing_ok=True)

    def local_folder(self) -> Path:
        return self.root

    def _publish(self, target: Path, data: bytes, move: Callable[[str, Path], None]) -> None:
        """tmp beside the target, fsync, move, fsync of the folder: whole or not at all, also after a power cut."""
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            move(str(temporary), target)
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        finally:
            temporary.unlink(missing_ok=True)


TEMPORARY = ".tmp-"


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


class S3Store:
    """A prefix of an S3 bucket, through s3fs; credentials and endpoint from the standard chain
    (``AWS_ENDPOINT_URL``, ``AWS_PROFILE``, instance roles ...)."""

    def __init__(self, uri: str) -> None:
        import s3fs  # a local run needs neither botocore's import time nor its credentials chain

        self.uri = uri.rstrip("/")
        self.root = self.uri.removeprefix("s3://")
        self.fs = s3fs.S3FileSystem(
            use_listings_cache=False, config_kwargs={"retries": {"max_attempts": 10, "mode": "adaptive"}}
        )

    def _key(self, path: str) -> str:
        return f"{self.root}/{checked(path)}" if path else self.root

    def read(self, path: str) -> bytes:
        return self.fs.cat_file(self._key(path))

    def exists(self, path: str) -> bool:
        return self.fs.isfile(self._key(path))

    def list(self, prefix: str = "") -> list[Entry]:
        try:
            found = self.fs.find(self._key(prefix), detail=True)
        except FileNotFoundError:
            return []
        start = len(self.root) + 1
        return sorted(Entry(key[start:], info["size"]) for key, info in found.items() if len(key) > start)

    def put(self, path: str, data: bytes) -> None:
        self.fs.pipe_file(self._key(path), data)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        # The look first also serves object stores that ignore If-None-Match; content is deterministic, so a lost race
        # writes equal bytes.
        if self.exists(path):
            return False
        try:
            self.fs.pipe_file(self._key(path), data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno != errno.EINVAL or not self.exists(path):  # Swift's 412 reaches s3fs as EINVAL
                raise
            return False
        return True

    def delete(self, path: str) -> None:
        if self.exists(path):
            self.fs.rm_file(self._key(path))

    def local_folder(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="diffva-"))
        for entry in self.list():
            target = folder / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.read(entry.path))
        return folder


STORES: dict[str, Callable[[str], Store]] = {"": LocalStore, "s3": S3Store}


def open_store(uri: str | os.PathLike[str]) -> Store:
    """The store at ``uri``: a local path or ``s3://bucket/prefix``. ValueError names an unknown scheme."""
    text = os.fspath(uri)
    scheme = text.split("://", 1)[0] if "://" in text else ""
    if scheme not in STORES:
        raise ValueError(f"{text}: unknown scheme {scheme!r}; use a local path or s3://")
    return STORES[scheme](text)


def join(uri: str, *parts: str) -> str:
    """``uri`` with path parts below it, for local paths and s3:// alike."""
    return "/".join([uri.rstrip("/"), *parts])
