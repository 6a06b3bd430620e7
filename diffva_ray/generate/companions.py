"""Reads the lung mask and the condition images of a planned record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffva_ray.data.conditions import decode_condition
from diffva_ray.data.images import BadImage, decode_mask
from diffva_ray.generate.data_identity import check_there, readable
from diffva_ray.generate.planned_files import PlannedFiles
from diffva_ray.schema import Status
from diffva_ray.storage.store import Store, StoreError


class Absent(BadImage):
    """A file that is gone."""


def lung_mask(files: PlannedFiles, about: Mapping[str, Any], path: str, size: int) -> NDArray[np.bool_] | None:
    """A planned lung mask [size, size]; None for a damaged one. Raises as ``_read``."""
    try:
        return decode_mask(_read(files, about, path, f"its lung mask {path} cannot be read any more"), size)
    except Absent:
        raise
    except (ValueError, OSError):
        return None


def condition_image(
    files: PlannedFiles, about: Mapping[str, Any], column: str, path: str, shape: tuple[int, int], size: int
) -> NDArray[np.float32]:
    """The condition image [3, size, size] of a column, for an X-ray of ``shape``. Raises BadImage for one that cannot
    be used, and as ``_read``."""
    if not path:
        raise BadImage(f"the data set names no image in column {column}", Status.MISSING)
    name = f"its condition image {path} ({column})"
    try:
        return decode_condition(_read(files, about, path, f"{name} cannot be read"), size, shape)
    except Absent:
        raise
    except BadImage as error:
        raise BadImage(f"{name}: {error}", error.status) from None


def _read(files: PlannedFiles, about: Mapping[str, Any], path: str, gone: str) -> bytes:
    """Read a file beside an image. Raises Absent, which says ``gone``, for one that is gone, Modified, and StoreError
    when the data set is gone or was for a moment."""
    try:
        return files.read(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        check_there(about, files.store)
        if readable(files.store, path):
            raise momentary(files.store, path) from None
        raise Absent(f"{gone} ({type(error).__name__})", Status.ERROR) from None


def momentary(store: Store, path: str) -> StoreError:
    """The error of a file that was missing and is there again."""
    return StoreError(f"{store.uri}/{path} was missing for a moment and is readable again")
