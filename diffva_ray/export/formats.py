"""The formats of an export: how a file of records is written, and how it is loaded again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from diffva_ray.export.coco import CocoFile
from diffva_ray.export.contents import Contents, dicom_schema
from diffva_ray.export.examples import Example
from diffva_ray.export.parquet import ParquetShard, schema
from diffva_ray.export.webdataset import TarShard, wids_index


class ShardFile(Protocol):
    """A file of an export while it is written. Equal examples give equal bytes."""

    def add(self, examples: Sequence[Example]) -> None:
        """Append examples."""

    def close(self) -> bytes:
        """Return the content of the file."""


@dataclass(frozen=True)
class Format:
    """A format of ``--to``."""

    folder: str  # of its files
    suffix: str
    records: int  # of a file, about; a file is held in memory
    pixels: int  # of all images of a kind in a file, at most about
    open: Callable[[Contents, str], ShardFile]  # the path of the file is the second argument
    loading: str  # Python code that loads the export, for its card
    headers: bool = False  # whether it needs the headers of DICOM images
    needs: Sequence[str] = ()  # packages of the extra with the name of the format
    schema: Callable[[Contents], pa.Schema] | None = None  # the columns, if the files are tables
    # The indexes by path, from the number of records by number and split.
    index: Callable[[Mapping[tuple[int, str], int]], dict[str, dict[str, Any]]] | None = None

    def path(self, split: str, number: int) -> str:
        """The path of a file in the export."""
        return f"{self.folder}/{split}-{number:05d}.{self.suffix}"


HUGGINGFACE = """from datasets import load_dataset

dataset = load_dataset("DIR")  # or streaming=True
row = dataset["SPLIT"][0]  # images are PIL images, row["attribution"] is [SIZE, SIZE]"""
WEBDATASET = """import glob
import webdataset

dataset = webdataset.WebDataset(sorted(glob.glob("DIR/shards/SPLIT-*.tar")), shardshuffle=False).decode("pil")
row = next(iter(dataset))  # row["counterfactual.png"], row["attribution.npy"] [SIZE, SIZE], row["json"]"""
COCO = """import json

coco = json.load(open("DIR/annotations/SPLIT-00000.json"))  # images, categories, annotations with compressed RLE
# with pycocotools: COCO(file).annToMask(annotation)"""

DICOM = """import highdicom, pandas, pydicom

records = pandas.read_parquet("DIR/records/SPLIT-00000.parquet")
counterfactual = pydicom.dcmread(f"DIR/{records.counterfactual_dicom[0]}").pixel_array  # uint8 [SIZE, SIZE]
signed = pydicom.dcmread(f"DIR/{records.attribution_dicom[0]}").pixel_array  # float32 [SIZE, SIZE] in [-1, 1]
regions = highdicom.seg.segread(f"DIR/{records.segmentation_dicom[0]}").pixel_array"""


def _dicom(contents: Contents, path: str) -> ShardFile:
    from diffva_ray.export.dicom import DicomTable  # needs the extra packages of DICOM

    return DicomTable(contents, path)


FORMATS = {
    "huggingface": Format("data", "parquet", 1000, 2**26, ParquetShard, HUGGINGFACE, schema=schema),
    "webdataset": Format("shards", "tar", 1000, 2**26, TarShard, WEBDATASET, index=wids_index),
    "coco": Format("annotations", "json", 50_000, 2**40, CocoFile, COCO),  # holds no pixels
    "dicom": Format("records", "parquet", 1000, 2**40, _dicom, DICOM, True, ("pydicom", "highdicom"), dicom_schema),
}
