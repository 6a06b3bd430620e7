"""What the files of an export hold, and where they go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa

from diffva_ray.export.examples import COPIES, IMAGES
from diffva_ray.generate.run import Run
from diffva_ray.schema import Record
from diffva_ray.storage.store import Store


@dataclass(frozen=True)
class Contents:
    """The contents of an export."""

    run: Run
    store: Store  # the folder of the export
    with_images: bool  # False: the images that show the source image are left out
    threshold: float | None = None  # of the attribution maps' regions, in (0, 1); COCO and DICOM only
    patients: bool = False  # copy the patient data of DICOM headers; DICOM only
    banner: bool = False  # burn a mark into the counterfactuals; DICOM only
    anonymous: bool = False  # whether ids replace the names of files

    @property
    def size(self) -> int:
        """Side of the images and maps in pixels."""
        return self.run.recipe.model.resolution

    @property
    def images(self) -> Sequence[str]:
        """Names of the images of an example."""
        return [name for name in IMAGES if self.with_images or name not in COPIES]

    @property
    def names(self) -> dict[str, str]:
        """The name in the export of each column of the records: a further column of the data set that has the name of
        an image is prefixed."""
        taken = {*IMAGES, "attribution"}
        return {name: f"record_{name}" if name in taken else name for name in self.run.records_schema.names}

    @property
    def columns(self) -> dict[str, pa.DataType]:
        """The types of the records' columns by their names in the export."""
        return dict(zip(self.names.values(), self.run.records_schema.types, strict=True))

    def row(self, record: Record) -> dict[str, Any]:
        """The values of a record by their names in the export."""
        values: Mapping[str, Any] = cast("Any", record)
        return {name: values[column] for column, name in self.names.items()}


def dicom_schema(contents: Contents) -> pa.Schema:
    """The columns of the table of a DICOM export: those of the records, and the path of each object."""
    kinds = ("image", "counterfactual", "attribution", "segmentation")[not contents.with_images :]
    return pa.schema([*contents.columns.items(), *((f"{kind}_dicom", pa.string()) for kind in kinds)])
