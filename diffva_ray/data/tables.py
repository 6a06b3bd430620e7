"""Reads tables as people have them: CSV with any delimiter and Unicode encoding, gzip, JSON lines, Parquet."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from io import BytesIO, StringIO
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from diffva_ray.data.dataset import UnusableData
from diffva_ray.progress import one_line
from diffva_ray.storage.store import Ranges

EXTENSIONS = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet", ".jsonl", ".ndjson")
DELIMITERS = ",;\t"
CSV_FIELD_BYTES = 1 << 27  # a run-length encoded mask may be long


class Line(NamedTuple):
    """A row of a table."""

    where: str  # position for messages: "images.csv row 2"; the header is row 1
    cells: dict[str, str]  # by column


class Table(NamedTuple):
    """A table whose cells are text."""

    columns: list[str]  # names, in the order of the file
    rows: list[Line]  # without empty lines
    unread: list[str]  # columns of Parquet that are neither text, numbers nor lists of them

    def require(self, name: str, *columns: str) -> Table:
        """The table itself. Raises UnusableData when it lacks one of the columns."""
        if missing := [column for column in columns if column not in self.columns]:
            raise UnusableData(f"{name}: lacks the columns {', '.join(missing)}; it has {', '.join(self.columns)}")
        return self


def read_table(data: bytes | Ranges, name: str, keep: Collection[str] = ()) -> Table:
    """Reads a table; empty cells are "", lists are joined by ``|``. Raises UnusableData for bytes that are no table.

    CSV may be UTF-8 or UTF-16, delimited by ``,``, ``;`` or tab. ``keep``: columns to read, if present; all if empty.
    Of a Parquet file, given as Ranges, only the columns of text and numbers are fetched.
    """
    if isinstance(data, bytes) and data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise UnusableData(f"{name}: damaged gzip file ({one_line(error)})") from None
    ending = name.lower().removesuffix(".gz").rpartition(".")[2]
    if ending == "parquet":
        columns, lines, unread = _parquet(BytesIO(data) if isinstance(data, bytes) else data, name)
    else:
        columns, lines, unread = (_jsonl if ending in ("jsonl", "ndjson") else _csv)(
            data if isinstance(data, bytes) else data.read(), name
        )
    kept = [column for column in dict.fromkeys(columns) if column and (not keep or column in keep)]
    at = [(column, columns.index(column)) for column in kept]
    rows = []
    least = max((number for number, column in enumerate(columns, start=1) if column), default=0)
    for number, line in enumerate(lines, start=2):
        if line:
            if len(line) < least or any(line[len(columns) :]):
                raise UnusableData(f"{name} row {number}: {len(line)} cells under {len(columns)} columns")
            rows.append(Line(f"{name} row {number}", {column: line[index] for column, index in at}))
    return Table(list(dict.fromkeys(filter(None, columns))), rows, unread)


Parsed = tuple[list[str], Iterable[list[str]], list[str]]


def _csv(data: bytes, name: str) -> Parsed:
    csv.field_size_limit(CSV_FIELD_BYTES)
    try:
        text = data.decode(_encoding(data))
        if text[:4].lower() == "sep=":  # Excel's line that names the delimiter
            text = text.partition("\n")[2]
        head = text.partition("\n")[0]
        delimiter = max(DELIMITERS, key=lambda sign: len(next(csv.reader([head], delimiter=sign), [])))
        lines = list(csv.reader(StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UnusableData(
            f"{name}: not a CSV table in UTF-8 or UTF-16 ({one_line(error)}); save it as UTF-8"
        ) from None
    if not lines:
        raise UnusableData(f"{name}: the table is empty")
    if not any(lines[0]):
        raise UnusableData(f"{name}: the first line is empty; it has to name the columns")
    return [column.strip() for column in lines[0]], lines[1:], []


def _encoding(data: bytes) -> str:
    """UTF-16 with a byte order mark, or without one where every second byte of the start is 0; else UTF-8."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    pairs = [(data[at], data[at + 1]) for at in range(0, min(len(data) - 1, 64), 2)]
    if pairs and all(low and not high for low, high in pairs[:4]):
        return "utf-16-le"
    return "utf-16-be" if pairs and all(low and not high for high, low in pairs[:4]) else "utf-8-sig"


def _jsonl(data: bytes, name: str) -> Parsed:
    rows = []
    for number, line in enumerate(data.decode("utf-8-sig", "replace").splitlines(), start=1):
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError as error:
            raise UnusableData(f"{name} line {number}: not JSON ({one_line(error)})") from None
        if not isinstance(row, dict):
            raise UnusableData(f"{name} line {number}: not a JSON object")
        rows.append(row)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return columns, [[as_cell(row.get(column)) for column in columns] if row else [] for row in rows], []


def as_cell(value: object) -> str:
    """A JSON value as a cell."""
    if isinstance(value, list):
        return "|".join(as_cell(part) for part in value)
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def _parquet(source: BytesIO | Ranges, name: str) -> Parsed:
    try:
        file = pq.ParquetFile(source)
        fields = [field for field in file.schema_arrow if _is_readable(field.type)]
        table = file.read([field.name for field in fields])
        names = _class_names(file.schema_arrow.metadata or {})
        cells = [_strings(column, names.get(field.name, ())) for field, column in zip(fields, table.columns)]
    except (pa.ArrowException, OSError) as error:
        raise UnusableData(f"{name}: not a readable Parquet table ({one_line(error)})") from None
    unread = [field.name for field in file.schema_arrow if field not in fields]
    return table.column_names, [list(line) for line in zip(*cells)], unread


def _is_readable(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind) or _is_list(kind):
        return _is_readable(kind.value_type)
    return not pa.types.is_nested(kind) and not any(
        test(kind) for test in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    )


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _strings(column: pa.ChunkedArray, classes: Sequence[str]) -> list[str]:
    """A column as cells. ``classes``: the names that the integers stand for, if any; -1 stands for none."""
    if classes:
        numbers = [cell if isinstance(cell, list) else [cell] for cell in column.to_pylist()]
        return ["|".join(classes[n] for n in cell if n is not None and 0 <= n < len(classes)) for cell in numbers]
    if _is_list(column.type):
        return ["|".join("" if part is None else str(part) for part in cell or ()) for cell in column.to_pylist()]
    return [cell or "" for cell in column.cast(pa.string()).to_pylist()]


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """Names of classes by column, as Hugging Face stores them in the schema: the ``names`` of a ``ClassLabel``, which
    may be inside a list."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, LookupError, TypeError):
        return {}
    found = {}
    for column, feature in features.items():
        while isinstance(feature, (list, dict)) and "names" not in feature:
            feature = (
                feature[0]
                if isinstance(feature, list) and feature
                else feature.get("feature")
                if isinstance(feature, dict)
                else None
            )
        if isinstance(feature, dict) and isinstance(feature["names"], list):
            found[column] = [str(name) for name in feature["names"]]
    return found
