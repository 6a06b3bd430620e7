"""Writes the files of records of an export. Files with different numbers are independent of each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from diffva_ray.evaluate.records import Lesions
from diffva_ray.export.contents import Contents
from diffva_ray.export.examples import Examples
from diffva_ray.export.formats import Format
from diffva_ray.export.selection import Selection
from diffva_ray.generate.committed import parts
from diffva_ray.storage.store import patiently

BATCH = 256  # records that are read before they are added to a file


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
    """Write the pending files with one number; memory holds one of them, and the records of all."""
    run, selection, shape = work.contents.run, work.selection, work.shape
    examples = Examples(run, work.lesions, work.contents.with_images, shape.headers, work.contents.anonymous)
    found: dict[str, list[pa.Table]] = {}  # the records by path
    for shard, table in parts(run, run.records_schema.names, shards=set(selection.shards(number).tolist())):
        for key, rows in selection.chosen(shard, table):
            if key in work.pending:
                found.setdefault(shape.path(key[1], number), []).append(rows)
    for path, tables in found.items():
        records, file = selection.ordered(pa.concat_tables(tables)), shape.open(work.contents, path)
        for batch in records.to_batches(BATCH):
            file.add(examples.read(batch.to_pylist()))
        data = file.close()
        patiently(lambda path=path, data=data: work.contents.store.put(path, data))  # type: ignore[misc]
    return list(found)
