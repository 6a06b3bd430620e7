"""What an export holds of one record: its row, images, attribution map and what is known about the image."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffva_ray.data.dataset import UnusableData
from diffva_ray.data.dicom import opened
from diffva_ray.data.encoding import encode_grey, encode_mask, map_levels, pixel_digest, quantise
from diffva_ray.data.images import BadImage, decode, decode_grey, decode_map, is_dicom, to_square
from diffva_ray.evaluate.anonymous import without_names
from diffva_ray.evaluate.records import Lesions, Truth, read_truth
from diffva_ray.evaluate.scores import lost
from diffva_ray.generate.run import DamagedPart, Run
from diffva_ray.generate.run_json import repair_command
from diffva_ray.schema import Record
from diffva_ray.storage.store import StoreError, join

THREADS = 4  # records that are read at the same time
IMAGES = ("image", "counterfactual", "reconstruction", "ground_truth", "lesion_mask", "lung_mask")  # of an Example
COPIES = ("image", "reconstruction", "ground_truth")  # of them, those that show the source image


@dataclass(frozen=True)
class Example:
    """One exported record. Images are 8-bit grey PNG files at the run's resolution; None: left out, or unknown."""

    record: Record
    counterfactual: bytes
    attribution: NDArray[np.float32]  # signed, [size, size] in [-1, 1]
    image: bytes | None  # the input at the run's resolution
    reconstruction: bytes | None
    ground_truth: bytes | None  # the ground-truth counterfactual
    lesion_mask: bytes | None
    lung_mask: bytes | None
    truth: Truth
    header: Any = None  # of the image's DICOM file, a pydicom data set without pixels


@dataclass(frozen=True)
class Examples:
    """Reads the examples of a run."""

    run: Run
    lesions: Lesions
    with_images: bool  # False: COPIES are left out
    with_headers: bool = False  # read the headers of DICOM images
    anonymous: bool = False  # whether ids replace the names of files

    def read(self, records: Sequence[Record]) -> list[Example]:
        """The examples of some ``ok`` records, in their order.

        Raises UnusableData for a source image or mask that has changed or is missing, DamagedPart for a damaged file of
        the run, StoreError."""
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(self._read, records))

    def _read(self, record: Record) -> Example:
        truth = read_truth(self.run, record, self.lesions)
        if lost(record, truth):
            path = join(self.run.data.uri, record["image_path"])
            raise UnusableData(f"{path}: a mask or the ground truth of this image cannot be read; restore that file")
        counterfactual, _ = self._own(record, "counterfactual_path", "counterfactual_sha256", decode_grey, _same)
        _, attribution = self._own(record, "attribution_path", "attribution_sha256", decode_map, map_levels)
        reconstruction = None
        if self.with_images:
            reconstruction, _ = self._own(record, "reconstruction_path", "reconstruction_sha256", decode_grey, _same)
        known = truth.counterfactual if self.with_images else None
        source = self._source(record) if self.with_images or self.with_headers else b""
        return Example(
            without_names(self.run, record) if self.anonymous else record,
            counterfactual,
            attribution,
            image=self._image(source) if self.with_images else None,
            reconstruction=reconstruction,
            ground_truth=None if known is None else encode_grey(quantise(known)),
            lesion_mask=None if truth.lesion is None else encode_mask(truth.lesion),
            lung_mask=None if truth.lungs is None else encode_mask(truth.lungs),
            truth=truth,
            header=_header(source) if self.with_headers and is_dicom(source) else None,
        )

    def _source(self, record: Record) -> bytes:
        """The image file. One that is no longer the one of the record must not be published."""
        path = record["image_path"]
        address = join(self.run.data.uri, path)
        try:
            data = self.run.data.read(path)
        except OSError as error:
            instead = "" if self.with_headers else ", or leave the images out with --without-images"
            raise UnusableData(
                f"{address} cannot be read ({error.strerror or error}); name the folder with --data{instead}"
            ) from None
        if hashlib.sha256(data).hexdigest() != record["image_sha256"]:
            raise UnusableData(f"{address} has changed since the run was generated; restore the original file")
        return data

    def _image(self, source: bytes) -> bytes:
        """The input as the engine saw it."""
        recipe = self.run.recipe
        return encode_grey(quantise(to_square(decode(source, bits=recipe.data.bits), recipe.model.resolution)))

    def _own(
        self,
        record: Record,
        path_column: str,
        digest_column: str,
        decoder: Callable[[bytes], NDArray[Any]],
        levels: Callable[[NDArray[Any]], NDArray[Any]],
    ) -> tuple[bytes, NDArray[Any]]:
        """A file of the run, and its pixels, which must be those of the record's digest."""
        path, expected = record[path_column], record[digest_column]  # type: ignore[literal-required]
        try:
            data = self.run.store.read(path)
            pixels = decoder(data)
            problem = "" if pixel_digest(levels(pixels)) == expected else "its pixels are not those of the record"
        except StoreError:
            raise
        except (OSError, BadImage) as error:
            problem = str(error)
        if problem:
            where = join(self.run.store.uri, path)
            raise DamagedPart(f"{where} cannot be exported ({problem}); {repair_command(self.run.store)}")
        return data, pixels


def _header(data: bytes) -> Any:
    header = opened(data)
    header.pop("PixelData", None)  # which may be large
    return header


def _same(pixels: NDArray[Any]) -> NDArray[Any]:
    return pixels
