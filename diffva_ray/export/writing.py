"""Writes the files of records of an export. Files with different numbers are independent of each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from diffva_ray.evaluate.records import Lesions
from diffva_ray.export.contents import Contents
from diffva_ray.export.examples import Examples
from diffva_ray.export.formats import Format, ShardFile
from diffva_ray.export.selection import Selection
from diffva_ray.generate.committed import parts
from diffva_ray.storage.store import patiently


@dataclass(frozen=True)
class Work:
    """The files that are to be written."""

    selection: Selection
    contents: Contents
    shape: Format
    pending: frozenset[tuple[int, str]]  # number and split
    lesions: Lesions


class LocalWriter:
    """Writes files in this process. Subclasses use other processes; the files are the same."""

    def write(self, work: Work, numbers: Sequence[int]) -> Iterable[list[str]]:
        """Write the pending files with each of ``numbers``, in their order; yield their paths."""
        return (write_files(work, number) for number in numbers)


def write_files(work: Work, number: int) -> list[str]:
    """Write the pending files with one number; memory holds one file of each split."""
    run, selection, shape = work.contents.run, work.selection, work.shape
    examples = Examples(run, work.lesions, work.contents.with_images, shape.headers, work.contents.anonymous)
    opened: dict[str, ShardFile] = {}  # by path
    first = number * selection.shards_per_file
    shards = range(first, first + selection.shards_per_file)
    for shard, table in parts(run, run.records_schema.names, shards=shards):
        for key, rows in selection.chosen(shard, table):
            if key in work.pending:
                path = shape.path(key[1], number)
                if path not in opened:
                    opened[path] = shape.open(work.contents, path)
                opened[path].add(examples.read(rows.to_pylist()))
    for path, file in opened.items():
        data = file.close()
        patiently(lambda path=path, data=data: work.contents.store.put(path, data))  # type: ignore[misc]
    return list(opened)
