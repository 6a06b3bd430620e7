"""Reads masks that a record does not depend on."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from diffva_ray.data.images import decode_mask


class Files(Protocol):
    """What a mask is read from: a store, or files guarded by other means."""

    def read(self, path: str) -> bytes: ...


def read_mask(files: Files, path: str, size: int) -> NDArray[np.bool_] | None:
    """A mask as in ``decode_mask``; None when it cannot be read, as a record does not depend on its mask."""
    try:
        return decode_mask(files.read(path), size)
    except (ValueError, OSError):  # BadImage is a ValueError
        return None
