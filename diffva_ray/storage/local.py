"""``Store`` in a folder of a local or mounted file system."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffva_ray.storage.store import Entry, Modified, StoreError, checked

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

    def read(self, path: str, unmodified_since: float | None = None) -> bytes:
        return self._read(path, 0, -1, unmodified_since)

    def read_range(self, path: str, start: int, stop: int, unmodified_since: float | None = None) -> bytes:
        return self._read(path, start, stop - start, unmodified_since)

    def _read(self, path: str, start: int, length: int, unmodified_since: float | None) -> bytes:
        with self._reading(path), open(self.root / checked(path), "rb") as file:
            # a time in the future is of a wrong clock
            if unmodified_since is not None and unmodified_since < os.fstat(file.fileno()).st_mtime <= time.time():
                raise Modified(f"{path} was written since")
            file.seek(start)
            return file.read(length)

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
