"""``Store`` that shows the images inside Parquet files and tar archives as files, without unpacking them.

Its address is ``archives://`` and the address of the store that has the archives. A member of a tar archive has the
path ``shard.tar/name``; row 12 of the column ``image`` of a Parquet file ``train.parquet/image/000012.png``.
"""

from __future__ import annotations

import builtins
import io
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diffva_ray.progress import one_line
from diffva_ray.storage.store import Entry, Ranges, Store, StoreError

SCHEME = "archives"
TAR, PARQUET = ".tar", ".parquet"
KEPT_BYTES = 1 << 28  # of the row groups that were read last; one row group is kept, whatever its size
BUFFER = 1 << 20  # bytes of one read of a tar archive
THREADS = 4  # archives that are listed at the same time
FORMATS = ((0, b"\x89PNG", ".png"), (0, b"\xff\xd8\xff", ".jpg"), (0, b"II*\0", ".tif"), (0, b"MM\0*", ".tif"),
           (0, b"BM", ".bmp"), (128, b"DICM", ".dcm"))  # fmt: skip
DAMAGED = ".damaged"  # extension of a member that starts like no image


def extension(head: bytes) -> str:
    """Extension of an image file by its first bytes."""
    return next((end for at, magic, end in FORMATS if head[at : at + len(magic)] == magic), DAMAGED)


def split(path: str) -> Iterator[tuple[str, str]]:
    """Every way to read a path as an archive and a member of it."""
    parts = path.split("/")
    for number, part in enumerate(parts[:-1], start=1):
        if part.lower().endswith((TAR, PARQUET)):
            yield "/".join(parts[:number]), "/".join(parts[number:])


class ArchiveStore:
    """The files of another store, with the members of its archives; read-only."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.uri = f"{SCHEME}://{inner.uri}"
        self._lock = Lock()  # one thread decodes at a time, so that one row group more than KEPT_BYTES is in memory
        self._is_archive = cache(inner.exists)
        self._tar = cache(lambda path: _tar_members(self.inner, path, self._size(path)))
        self._file = cache(lambda path: _Images(self.inner, path, self._size(path)))
        self._groups: OrderedDict[tuple[str, str, int], pa.ChunkedArray] = OrderedDict()
        self._sizes: dict[str, int] = {}

    def __reduce__(self) -> tuple[type[ArchiveStore], tuple[Store]]:
        return ArchiveStore, (self.inner,)

    def read(self, path: str, unmodified_since: float | None = None) -> bytes:
        archive, member = self._member(path)
        if not archive:
            return self.inner.read(path, unmodified_since)
        if archive.lower().endswith(TAR):
            offset, size = self._place(archive, member)
            return self.inner.read_range(archive, offset, offset + size, unmodified_since)
        if unmodified_since is not None:
            self.inner.read_range(archive, 0, 1, unmodified_since)
        return self._content(archive, member)

    def read_range(self, path: str, start: int, stop: int, unmodified_since: float | None = None) -> bytes:
        archive, member = self._member(path)
        if not archive:
            return self.inner.read_range(path, start, stop, unmodified_since)
        if archive.lower().endswith(TAR):
            offset, size = self._place(archive, member)
            return self.inner.read_range(archive, offset + start, offset + min(stop, size), unmodified_since)
        return self.read(path, unmodified_since)[start:stop]

    def exists(self, path: str) -> bool:
        archive, member = self._member(path)
        if not archive:
            return self.inner.exists(path)
        try:
            if archive.lower().endswith(TAR):
                self._place(archive, member)
            else:
                self._content(archive, member)
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str = "") -> builtins.list[Entry]:
        """The files and, after each archive, its members. Reads the image columns of Parquet files once."""
        entries = self.inner.list(prefix)
        self._sizes |= {entry.path: entry.size for entry in entries}
        archives = [entry for entry in entries if entry.path.lower().endswith((TAR, PARQUET))
                    and not entry.path.rpartition("/")[2].startswith(".")]  # fmt: skip
        with ThreadPoolExecutor(THREADS) as pool:
            members = [entry for found in pool.map(self.members, archives) for entry in found]
        return sorted([*entries, *members])

    def members(self, archive: Entry) -> builtins.list[Entry]:
        """The members of a listed archive."""
        path = archive.path
        self._sizes[path] = archive.size
        if path.lower().endswith(TAR):
            return [Entry(f"{path}/{name}", size) for name, (_, size) in self._tar(path).items()]
        return [Entry(f"{path}/{name}", size) for name, size in self._file(path).members()]

    def holds_images(self, archive: Entry) -> bool:
        """Whether a listed Parquet file has a column of images."""
        self._sizes[archive.path] = archive.size
        return bool(self._file(archive.path).columns)

    def put(self, path: str, data: bytes) -> NoReturn:
        raise StoreError(f"{self.uri}: archives are read-only", lasting=True)

    put_if_absent = put

    def delete(self, path: str) -> NoReturn:
        self.put(path, b"")

    def sweep(self) -> int:
        return 0

    def local_folder(self) -> Path:
        return self.inner.local_folder()

    def _member(self, path: str) -> tuple[str, str]:
        """The archive of a path and the member in it; empty for a file of the inner store."""
        return next((found for found in split(path) if self._is_archive(found[0])), ("", ""))

    def _size(self, path: str) -> int:
        """Size of an archive. A worker, which has not listed them, lists the folder of the archive."""
        if path not in self._sizes:
            self._sizes |= {entry.path: entry.size for entry in self.inner.list(path.rpartition("/")[0])}
        return self._sizes[path]

    def _place(self, archive: str, member: str) -> tuple[int, int]:
        """Offset and size of a member of a tar archive."""
        with self._lock:
            members = self._tar(archive)
        if member not in members:
            raise FileNotFoundError(f"{archive}/{member}")
        return members[member]

    def _content(self, archive: str, member: str) -> bytes:
        """The image of a row of a Parquet file."""
        column, _, name = member.rpartition("/")
        stem, dot, end = name.partition(".")
        with self._lock:
            file = self._file(archive)
            if column not in file.columns or not stem.isdecimal() or int(stem) >= file.rows:
                raise FileNotFoundError(f"{archive}/{member}")
            group, row = file.place(int(stem))
            content: bytes | None = self._group(archive, column, group)[row].as_py()
        if content is None or extension(content) != dot + end:
            raise FileNotFoundError(f"{archive}/{member}")
        return content

    def _group(self, *key: Any) -> pa.ChunkedArray:
        """The images of a row group (file, column, number), which neighbouring rows share."""
        if key not in self._groups:
            self._groups[key] = self._file(key[0]).group(*key[1:])
            while len(self._groups) > 1 and sum(group.nbytes for group in self._groups.values()) > KEPT_BYTES:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]


def _tar_members(store: Store, path: str, size: int) -> dict[str, tuple[int, int]]:
    """Offset and size by name of the files in a tar archive."""
    found = {}
    try:
        with tarfile.open(fileobj=io.BufferedReader(Ranges(store, path, size), BUFFER), mode="r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name.lstrip("/"))
                if member.isreg() and not member.issparse() and ".." not in name.parts:
                    found[str(name)] = member.offset_data, member.size
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every member
    except tarfile.TarError as error:
        raise OSError(f"{path}: no tar archive, or a damaged one: {one_line(error)}") from None
    return found


class _Images:
    """The columns of images of a Parquet file: structs with ``bytes``, as Hugging Face writes them, or plain bytes.

    Threads that share a ParquetFile crash, so every read opens the file anew with the same metadata."""

    def __init__(self, store: Store, path: str, size: int) -> None:
        self.store, self.path, self.size = store, path, size
        self.metadata: Any = None
        with self._damaged():
            file = self._open()
            self.metadata = file.metadata
            kinds = {field.name: field.type for field in file.schema_arrow}
        self.rows: int = self.metadata.num_rows
        self.leaves = {name: leaf for name, kind in kinds.items() if (leaf := _leaf(name, kind)) and "/" not in name}
        self.columns = [name for name in self.leaves if self._has_images(name, kinds[name])]

    def members(self) -> Iterator[tuple[str, int]]:
        """Name and size of every image."""
        for column in self.columns:
            row = 0
            for group in range(self.metadata.num_row_groups):
                for content in self.group(column, group):
                    if content.is_valid:
                        data = content.as_buffer()
                        yield f"{column}/{row:06d}{extension(data[:132].to_pybytes())}", data.size
                    row += 1

    def place(self, row: int) -> tuple[int, int]:
        """Row group of a row, and position in it."""
        group = 0
        while row >= (rows := self.metadata.row_group(group).num_rows):
            group, row = group + 1, row - rows
        return group, row

    def group(self, column: str, number: int) -> pa.ChunkedArray:
        """The images of a row group. A writer puts the images of a row group into one page, so it is read whole."""
        with self._damaged():
            values = self._open().read_row_group(number, [self.leaves[column]]).column(0)
            return pc.struct_field(values, "bytes") if pa.types.is_struct(values.type) else values

    def _has_images(self, column: str, kind: pa.DataType) -> bool:
        """Whether a column holds images: a struct does; plain bytes do if the first ones start like an image."""
        if pa.types.is_struct(kind):
            return True
        return self.rows > 0 and any(
            extension(content.as_buffer()[:132].to_pybytes()) != DAMAGED
            for content in self.group(column, 0)
            if content.is_valid
        )

    def _open(self) -> pq.ParquetFile:
        ranges = Ranges(self.store, self.path, self.size)
        return pq.ParquetFile(ranges, metadata=self.metadata, pre_buffer=False)

    @contextmanager
    def _damaged(self) -> Iterator[None]:
        try:
            yield
        except pa.ArrowException as error:
            raise OSError(f"{self.path}: no readable Parquet file: {one_line(error)}") from None


def _leaf(name: str, kind: Any) -> str:
    """Path of the bytes of a column that may hold images, in the schema; empty for another column."""
    if pa.types.is_struct(kind) and (index := kind.get_field_index("bytes")) >= 0:
        return f"{name}.bytes" if _is_binary(kind.field(index).type) else ""
    return name if _is_binary(kind) else ""


def _is_binary(kind: Any) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
