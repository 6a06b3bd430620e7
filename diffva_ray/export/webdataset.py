"""Tar shards as WebDataset reads them: the files of a record follow each other and share the record's id."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from diffva_ray.evaluate.tables import clean
from diffva_ray.export.contents import Contents
from diffva_ray.export.examples import Example


def wids_index(files: Mapping[tuple[int, str], int]) -> dict[str, dict[str, Any]]:
    """The indexes with which ``wids`` of webdataset reads single records, one for each split, by path.

    ``files``: number of records by number of the file and split."""
    indexes: dict[str, dict[str, Any]] = {}
    for (number, split), count in sorted(files.items()):
        new = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": split, "shardlist": []}
        shards = indexes.setdefault(f"{split}.wids.json", new)["shardlist"]
        shards.append({"url": f"shards/{split}-{number:05d}.tar", "nsamples": count})
    return indexes


class TarShard:
    """A tar file. Owner, time and mode of its members are fixed, so that equal examples give equal bytes."""

    def __init__(self, contents: Contents, path: str) -> None:
        self.contents, self.sink = contents, io.BytesIO()
        self.archive = tarfile.TarFile(fileobj=self.sink, mode="w", format=tarfile.USTAR_FORMAT)

    def add(self, examples: Sequence[Example]) -> None:
        for example in examples:
            for suffix, data in self._files(example):
                member = tarfile.TarInfo(f"{example.record['record_id']}.{suffix}")
                member.size, member.mode = len(data), 0o644
                self.archive.addfile(member, io.BytesIO(data))

    def close(self) -> bytes:
        self.archive.close()
        return self.sink.getvalue()

    def _files(self, example: Example) -> Iterator[tuple[str, bytes]]:
        for name in self.contents.images:
            if (data := getattr(example, name)) is not None:
                yield f"{name}.png", data
        buffer = io.BytesIO()
        np.save(buffer, example.attribution)
        yield "attribution.npy", buffer.getvalue()
        yield "json", json.dumps(clean(self.contents.row(example.record))).encode()
