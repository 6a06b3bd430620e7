"""What all object stores share: a file appears by one request, and is created by one conditional PUT."""

from __future__ import annotations

import atexit
import errno
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path

from diffva_ray.progress import LOG
from diffva_ray.storage.store import Entry, StoreError, checked

MAX_CONFLICTS = 5  # attempts of a conditional PUT that collides with another request for the same key


class ObjectStore(ABC):
    """Files below ``SCHEME://bucket/prefix``. A file is written by one PUT, so it appears whole or not at all."""

    uri: str
    conditional: bool | None = None  # whether the server honours a conditional PUT; None: not known yet

    @abstractmethod
    def read(self, path: str, unmodified_since: float | None = None) -> bytes: ...

    @abstractmethod
    def exists(self, path: str) -> bool: ...

    @abstractmethod
    def list(self, prefix: str = "") -> list[Entry]: ...

    @abstractmethod
    def put(self, path: str, data: bytes) -> None: ...

    @abstractmethod
    def _create(self, path: str, data: bytes) -> None:
        """Write a file by a conditional PUT.

        Raises FileExistsError if the file exists, OSError with ENOSYS if the server knows no condition and with EBUSY
        if the request collides with another one, StoreError."""

    def put_if_absent(self, path: str, data: bytes) -> bool:
        # `exists` first, until the server has refused to replace a file: some ignore the condition. Swift checks it
        # without a lock; two writers that race there mostly write equal bytes, because content follows from the plan.
        for attempt in range(MAX_CONFLICTS):
            if not self.conditional and self.exists(path):
                return False
            if self.conditional is False:
                self.put(path, data)
                return True
            try:
                self._create(path, data)
            except FileExistsError:
                self.conditional = True
                return False
            except OSError as error:
                if error.errno == errno.ENOSYS:
                    self._ignored()
                else:  # after a collision the file may or may not exist: check again
                    time.sleep(0.1 * 2**attempt)
            else:
                if self.conditional is None and self._refuses(path, data) is False:
                    self._ignored()
                return True
        raise self._failed(f"{path} was in use at each of {MAX_CONFLICTS} attempts to write it")

    def _refuses(self, path: str, data: bytes) -> bool | None:
        """Note and return whether the server refuses to replace the file that was just written (by the same bytes)."""
        try:
            self._create(path, data)
        except OSError as error:
            if isinstance(error, FileExistsError):
                self.conditional = True
            return self.conditional
        return False

    def _ignored(self) -> None:
        self.conditional = False
        LOG.info("%s: the server has no conditional PUT; each commit checks for the file first", self.uri)

    def sweep(self) -> int:
        return 0

    def local_folder(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="diffva-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        for entry in self.list():
            target = folder / checked(entry.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.read(entry.path))
        return folder

    def _failed(self, reason: str, lasting: bool = False) -> StoreError:
        return StoreError(f"{self.uri}: {reason}", lasting)
