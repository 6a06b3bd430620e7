"""How many bits the 16-bit grey files of a data set use: 12-bit values in a 16-bit file look black, and decode."""

from __future__ import annotations

from diffva_ray.data.dataset import Dataset
from diffva_ray.data.images import BadImage, describe, largest_value
from diffva_ray.schema import digest

LOOKED_AT = 32  # files, spread over the data set
HEADER = 33  # bytes: a PNG's bit depth stands in its first chunk


def bit_depth_note(dataset: Dataset) -> str:
    """One line when the 16-bit grey files of a data set use fewer bits than ``data.bits`` says; else empty.

    A sample of LOOKED_AT files is looked at. Raises StoreError when the store fails.
    """
    paths = sorted({image.path for image in dataset.images if image.size >= 0}, key=digest)[:LOOKED_AT]
    largest = [value for path in paths if (value := _largest(dataset, path)) is not None]
    used = max(largest, default=0).bit_length()
    if not largest or used == dataset.bits or used < dataset.bits < 16:
        return ""
    said = f"the {len(largest)} of them looked at have values up to {max(largest)}, which {used} bits hold"
    if used > dataset.bits:
        return f"16-bit files: {said}; with data.bits={dataset.bits} those are refused: give --set data.bits={used}"
    share = (2**used - 1) / (2**dataset.bits - 1)
    return (
        f"16-bit files: {said}: at most {share:.1%} of the grey scale. They are read dark, or refused as blank; for "
        f"such a data set give --set data.bits={max(used, 8)}"
    )


def _largest(dataset: Dataset, path: str) -> int | None:
    """The largest value of a 16-bit grey file; None for every other one."""
    try:
        head = dataset.store.read_range(path, 0, HEADER)
        if head.startswith(b"\x89PNG") and (head[24], head[25]) != (16, 0):  # bit depth, grey without alpha
            return None
        if not head.startswith((b"\x89PNG", b"II", b"MM")):
            return None
        data = dataset.store.read(path)
        return largest_value(data) if describe(data).endswith("grey 16-bit") else None
    except (BadImage, OSError, IndexError):
        return None
