"""DICOM files of each record, and a Parquet table of the records that names them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffva_ray.data.dataset import UnusableData
from diffva_ray.export.contents import Contents, dicom_schema
from diffva_ray.export.dicom_objects import Objects
from diffva_ray.export.examples import Example
from diffva_ray.progress import one_line
from diffva_ray.storage.store import join


class DicomTable:
    """A Parquet file of records, with the DICOM files beside it in ``instances/<name of the file>/<record_id>/``."""

    def __init__(self, contents: Contents, path: str) -> None:
        self.contents = contents
        self.folder = f"instances/{PurePosixPath(path).stem}"
        self.rows: list[dict[str, Any]] = []

    def add(self, examples: Sequence[Example]) -> None:
        for example in examples:
            paths = {}
            for kind, data in self._files(example).items():
                paths[f"{kind}_dicom"] = f"{self.folder}/{example.record['record_id']}/{kind}.dcm"
                self.contents.store.put(paths[f"{kind}_dicom"], data)
            self.rows.append(self.contents.row(example.record) | paths)

    def close(self) -> bytes:
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(self.rows, dicom_schema(self.contents)), sink, compression="zstd")
        return sink.getvalue()

    def _files(self, example: Example) -> dict[str, bytes]:
        try:
            return Objects(self.contents, example).files()
        except (ValueError, TypeError, KeyError) as error:  # from a header that highdicom refuses
            where = join(self.contents.run.data.uri, example.record["image_path"])
            raise UnusableData(f"{where}: no DICOM object can be made of it ({one_line(error, 120)})") from error
