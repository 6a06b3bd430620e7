"""Detects 16-bit grey files that use fewer bits: 12-bit values in a 16-bit file decode to a nearly black image."""

from __future__ import annotations

from diffva_ray.data.dataset import Dataset
from diffva_ray.data.images import BadImage, describe, largest_value

SAMPLE_SIZE = 32  # files, spread over the data set
HEADER_BYTES = 33  # a PNG's bit depth is in its first chunk


def bit_depth_note(dataset: Dataset) -> str:
    """One line when the 16-bit grey files of a data set use other bits than ``data.bits`` says; else empty.

    Examines SAMPLE_SIZE files. Raises StoreError when the store fails.
    """
    largest = [value for path in dataset.sample_paths(SAMPLE_SIZE) if (value := _largest(dataset, path)) is not None]
    used = max(largest, default=0).bit_length()
    if not largest or used == dataset.bits or used < dataset.bits < 16:
        return ""
    finding = f"16-bit files: the largest value in {len(largest)} sampled files is {max(largest)} ({used} bits)"
    if used > dataset.bits:
        return f"{finding}; with data.bits={dataset.bits} such files are refused: use --set data.bits={used}"
    share = (2**used - 1) / (2**dataset.bits - 1)
    return (
        f"{finding}, at most {share:.1%} of the grey scale. These images decode too dark or are refused as blank; "
        f"use --set data.bits={max(used, 8)}"
    )


def _largest(dataset: Dataset, path: str) -> int | None:
    """The largest value of a 16-bit grey file; None for any other file."""
    try:
        head = dataset.store.read_range(path, 0, HEADER_BYTES)
        if head.startswith(b"\x89PNG") and (head[24], head[25]) != (16, 0):  # bit depth, grey without alpha
            return None
        if not head.startswith((b"\x89PNG", b"II", b"MM")):
            return None
        data = dataset.store.read(path)
        return largest_value(data) if describe(data).endswith("grey 16-bit") else None
    except (BadImage, OSError, IndexError):
        return None
