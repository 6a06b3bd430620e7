"""Writes the images and features of one attempt at a shard, without ever changing a file of another attempt.

Another process may work on the same shard: one that was paused, or another driver. On an equal device it writes equal
bytes. Where it wrote other bytes, this attempt's file gets a name of its own, which the shard's part names. So the part
of whichever process commits names that process's own files.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from diffva_ray._version import __version__
from diffva_ray.generate.run import Run, part
from diffva_ray.schema import Record
from diffva_ray.storage.store import Store


class AlreadyCommitted(Exception):
    """Another process has committed the shard; no failure."""


def commit_path(shard: int) -> str:
    """Path of the Parquet part whose appearance is the commit of a shard."""
    return f"records/{part(shard)}.parquet"


def features_path(shard: int) -> str:
    """Path of a shard's features, unless its part names another one in its metadata under ``features``."""
    return f"features/{part(shard)}.npz"


def stored_features_path(store: Store, shard: int, folder: str = "") -> str:
    """Path of the features of a committed shard, as its part names it; ``folder``: of a retry, ends with a slash."""
    schema = pq.read_schema(io.BytesIO(store.read(f"{folder}{commit_path(shard)}")))
    metadata: dict[bytes, bytes] = schema.metadata or {}
    return folder + metadata.get(b"features", features_path(shard).encode()).decode()


class ShardFiles:
    """The files of one attempt; ``token`` is its random id."""

    def __init__(self, store: Store, shard: int, token: str) -> None:
        self.store, self.shard, self.token = store, shard, token
        self.checked = False  # whether the commit was looked for before the first file
        self.lock = threading.Lock()

    def write(self, path: str, data: bytes) -> str:
        """Write a file unless an equal one is there; returns its path, which has the token if another file is there.

        Raises AlreadyCommitted before the first file of a shard that is committed, or instead of a name of its own."""
        with self.lock:
            if not self.checked:
                self._check_pending()
                self.checked = True
        if self.store.put_if_absent(path, data) or self._is_there(path, data):
            return path
        self._check_pending()
        stem, _, suffix = path.rpartition(".")
        own = f"{stem}.{self.token}.{suffix}"
        self.store.put(own, data)
        return own

    def _check_pending(self) -> None:
        if self.store.exists(commit_path(self.shard)):
            raise AlreadyCommitted

    def _is_there(self, path: str, data: bytes) -> bool:
        try:
            return self.store.read(path) == data
        except OSError:  # for example a folder
            return False


def records_part(run: Run, shard: int, records: Sequence[Record], features: str = "") -> bytes:
    """A shard's Parquet part, serialised in memory so that it is written as a whole; ``features``: path of their file,
    by default ``features_path``."""
    metadata = {"fingerprint": run.fingerprint, "shard": str(shard), "diffva_ray": __version__}
    if features not in ("", features_path(shard)):
        metadata["features"] = features
    table = pa.Table.from_pylist(list(records), schema=run.records_schema.with_metadata(metadata))
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
