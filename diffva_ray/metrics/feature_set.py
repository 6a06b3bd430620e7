"""Feature vectors of a set of images, possibly larger than memory: selected rows of an [M, d] array or memmap."""

from __future__ import annotations

import io
import mmap
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 4096  # rows to read at once: 64 MiB of 2048 features in float64


def npz(arrays: Mapping[str, Any]) -> bytes:
    """Bytes of an .npz file with the named arrays, the format of stored features."""
    sink = io.BytesIO()
    np.savez(sink, **arrays)
    return sink.getvalue()


class FeatureSet:
    """Rows ``rows`` (all by default) of a feature matrix ``base`` [M, d], an array or a ``numpy.memmap``, read only
    when they are needed. Raises ValueError if ``base`` is not [M, d]."""

    def __init__(self, base: NDArray[np.floating], rows: NDArray[np.integer] | None = None) -> None:
        if base.ndim != 2:
            raise ValueError(f"features are one row per image, [N, d], got shape {base.shape}")
        self.base = base
        self.rows = np.arange(len(base)) if rows is None else np.asarray(rows, np.intp)

    @classmethod
    def of(cls, features: FeatureSet | NDArray[np.floating]) -> FeatureSet:
        """``features`` as a set; an array [N, d] is one with all its rows."""
        return features if isinstance(features, FeatureSet) else cls(features)

    @property
    def dimension(self) -> int:
        return int(self.base.shape[1])

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: NDArray[np.integer] | NDArray[np.bool_]) -> FeatureSet:
        """The set of the rows at ``chosen`` (indices, or a mask)."""
        return FeatureSet(self.base, self.rows[chosen])

    def sampled(self, count: int, random: np.random.Generator) -> FeatureSet:
        """At most ``count`` rows, sampled without replacement; the set itself if it is not larger."""
        return self if len(self) <= count else self.take(np.sort(random.choice(len(self), count, replace=False)))

    def load(self) -> NDArray[np.float64]:
        """All rows [N, d]."""
        rows = np.asarray(self.base[self.rows], np.float64)
        release(self.base)
        return rows

    def blocks(self) -> Iterator[NDArray[np.float64]]:
        """The rows in order, at most BLOCK at a time."""
        for start in range(0, len(self), BLOCK):
            yield np.asarray(self.base[self.rows[start : start + BLOCK]], np.float64)
            release(self.base)

    @staticmethod
    def together(sets: list[FeatureSet]) -> FeatureSet:
        """The rows of all sets; they are read only if the sets have different matrices."""
        if all(each.base is sets[0].base for each in sets):
            return FeatureSet(sets[0].base, np.concatenate([each.rows for each in sets]))
        return FeatureSet(np.concatenate([each.base[each.rows] for each in sets]))


def release(matrix: NDArray[np.floating]) -> None:
    """Free the memory of a memmap's pages; they are read again when needed, and written data is kept."""
    mapped = getattr(matrix, "_mmap", None)
    if mapped is not None:
        mapped.madvise(mmap.MADV_DONTNEED)


Features = FeatureSet | NDArray[np.floating]  # accepted by all set metrics: a set, or an array [N, d]
