"""Parquet shards with embedded PNG images, which Hugging Face ``datasets`` reads with the types of its own features."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffva_ray.export.contents import Contents
from diffva_ray.export.examples import Example

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # how ``datasets`` stores its feature Image
ARRAY = "datasets.features.features.Array2DExtensionType"  # and its feature Array2D
ROWS = 100  # of a row group, the unit of streaming


def schema(contents: Contents) -> pa.Schema:
    """The columns: images, attribution map, columns of the records. Features are in the metadata ``huggingface``."""
    shape = [contents.size] * 2
    # an extension type to ``datasets``, and lists of lists to everybody else
    extension = {"ARROW:extension:name": ARRAY, "ARROW:extension:metadata": json.dumps([shape, "float32"])}
    maps = pa.field("attribution", pa.list_(pa.list_(pa.float32())), metadata=extension)
    fields = [*(pa.field(name, IMAGE) for name in contents.images), maps]
    fields += [pa.field(*column) for column in contents.columns.items()]
    features: dict[str, Any] = {name: {"_type": "Image"} for name in contents.images}
    features["attribution"] = {"shape": shape, "dtype": "float32", "_type": "Array2D"}
    for name, kind in contents.columns.items():
        dtype = "float64" if pa.types.is_floating(kind) else str(kind)
        features[name] = {"dtype": dtype, "_type": "Value"}
    return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": features}})})


class ParquetShard:
    """A Parquet file."""

    def __init__(self, contents: Contents, path: str) -> None:
        self.contents, self.schema = contents, schema(contents)
        self.sink = io.BytesIO()
        self.writer = pq.ParquetWriter(self.sink, self.schema, compression="zstd")
        self.waiting: list[Example] = []  # for a full row group

    def add(self, examples: Sequence[Example]) -> None:
        self.waiting += examples
        while len(self.waiting) >= ROWS:
            self._write(self.waiting[:ROWS])
            del self.waiting[:ROWS]

    def close(self) -> bytes:
        if self.waiting:
            self._write(self.waiting)
        self.writer.close()
        return self.sink.getvalue()

    def _write(self, examples: Sequence[Example]) -> None:
        columns: list[Any] = [
            pa.array([_image(getattr(example, name), example) for example in examples], IMAGE)
            for name in self.contents.images
        ]
        columns.append(_maps(np.stack([example.attribution for example in examples])))
        rows = [self.contents.row(example.record) for example in examples]
        columns += [pa.array([row[name] for row in rows], kind) for name, kind in self.contents.columns.items()]
        self.writer.write_table(pa.Table.from_arrays(columns, schema=self.schema))


def _image(data: bytes | None, example: Example) -> dict[str, Any] | None:
    return None if data is None else {"bytes": data, "path": f"{example.record['record_id']}.png"}


def _maps(maps: Any) -> pa.Array:
    """Maps, float32 [N, H, W], as lists of lists, without a copy as Python numbers."""
    count, height, width = maps.shape
    rows = pa.ListArray.from_arrays(pa.array(np.arange(count * height + 1) * width, pa.int32()), pa.array(maps.ravel()))
    return pa.ListArray.from_arrays(pa.array(np.arange(count + 1) * height, pa.int32()), rows)
