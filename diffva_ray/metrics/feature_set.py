"""Feature vectors of a set of images, which may be more than memory holds: selected rows of an [M, d] array or
memmap."""

from __future__ import annotations

import io
import mmap
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 4096  # rows at a time: 64 MiB of 2048 features in float64


def npz(arrays: Mapping[str, Any]) -> bytes:
    """Named arrays as an .npz file, as features are stored."""
    sink = io.BytesIO()
    np.savez(sink, **arrays)
    return sink.getvalue()


class FeatureSet:
    """Rows ``rows`` of ``base`` [M, d], an array or a ``numpy.memmap``; nothing is read before it is asked for.

    Raises ValueError for a ``base`` that is not [M, d].
    """

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

    def drawn(self, most: int, random: np.random.Generator) -> FeatureSet:
        """At most ``most`` rows, drawn without replacement; the set itself where it has no more."""
        return self if len(self) <= most else self.take(np.sort(random.choice(len(self), most, replace=False)))

    def load(self) -> NDArray[np.float64]:
        """All rows [N, d]."""
        found = np.asarray(self.base[self.rows], np.float64)
        release(self.base)
        return found

    def blocks(self) -> Iterator[NDArray[np.float64]]:
        """The rows in order, at most BLOCK at a time."""
        for start in range(0, len(self), BLOCK):
            yield np.asarray(self.base[self.rows[start : start + BLOCK]], np.float64)
            release(self.base)

    @staticmethod
    def together(sets: list[FeatureSet]) -> FeatureSet:
        """The rows of all sets; read only where they are not of one matrix."""
        if all(one.base is sets[0].base for one in sets):
            return FeatureSet(sets[0].base, np.concatenate([one.rows for one in sets]))
        return FeatureSet(np.concatenate([one.base[one.rows] for one in sets]))


def release(matrix: NDArray[np.floating]) -> None:
    """Give back the memory that pages of a matrix on disk have taken so far; they are read again when they are needed,
    and what was written is kept."""
    mapped = getattr(matrix, "_mmap", None)
    if mapped is not None:
        mapped.madvise(mmap.MADV_DONTNEED)


Features = FeatureSet | NDArray[np.floating]  # what metrics take: a set, or an array [N, d]
