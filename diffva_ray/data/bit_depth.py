"""Detects 16-bit grey files that use fewer bits: 12-bit values in a 16-bit file decode to a nearly black image."""

from __future__ import annotations

from collections.abc import Sequence

from diffva_ray.data.dataset import Dataset, UnusableData
from diffva_ray.data.images import BadImage, decode, describe

SAMPLE_SIZE = 32  # files, spread over the data set
HEADER_BYTES = 33  # a PNG's bit depth is in its first chunk
CLEARLY_FEWER = 14  # bits: a quarter of the grey scale. Dark images of 16 bits may reach only a half of it


def bit_depth_note(dataset: Dataset) -> str:
    """One line when the 16-bit grey files of a data set use other bits than ``data.bits`` says; else empty.

    Examines SAMPLE_SIZE files. Raises StoreError when the store fails.
    """
    return _note(_sampled(dataset), dataset.bits)


def checked_bit_depth(dataset: Dataset) -> str:
    """As ``bit_depth_note``. Raises UnusableData when the files clearly use fewer bits and ``data.bits`` does not say
    how many: their images would be computed as dark ones."""
    largest = _sampled(dataset)
    _refuse(largest, dataset.bits, dataset.store.uri)
    return _note(largest, dataset.bits)


def check_image_bits(data: bytes, bits: int, name: str) -> None:
    """Raises UnusableData for a single image as ``checked_bit_depth`` does for a data set."""
    _refuse([value] if (value := _largest_of(data)) is not None else [], bits, name)


def _refuse(largest: Sequence[int], bits: int, name: str) -> None:
    used = max(largest, default=0).bit_length()
    if largest and bits == 16 and used <= CLEARLY_FEWER:
        raise UnusableData(
            f"{name}: {_note(largest, bits)}, or --set data.bits={CLEARLY_FEWER + 1} if they are so dark"
        )


def _note(largest: Sequence[int], bits: int) -> str:
    """The line about the largest values of some files."""
    used = max(largest, default=0).bit_length()
    if not largest or used == bits or used < bits < 16:
        return ""
    files = f"{len(largest)} sampled files" if len(largest) > 1 else "the file"
    finding = f"16-bit files: the largest value in {files} is {max(largest)} ({used} bits)"
    if used > bits:
        return f"{finding}; with data.bits={bits} such files are refused: use --set data.bits={used}"
    share = (2**used - 1) / (2**bits - 1)
    return (
        f"{finding}, at most {share:.1%} of the grey scale, and would be too dark; use --set data.bits={max(used, 8)}"
    )


def _sampled(dataset: Dataset) -> list[int]:
    """The largest value of each sampled file of 16-bit grey."""
    values = (_largest(dataset, path) for path in dataset.sample_paths(SAMPLE_SIZE))
    return [value for value in values if value is not None]


def _largest(dataset: Dataset, path: str) -> int | None:
    """The largest value of a 16-bit grey file; None for any other file."""
    try:
        head = dataset.store.read_range(path, 0, HEADER_BYTES)
        if head.startswith(b"\x89PNG") and (head[24], head[25]) != (16, 0):  # bit depth, grey without alpha
            return None
        return _largest_of(dataset.store.read(path)) if _may_be_deep(head) else None
    except (OSError, IndexError):
        return None


def _may_be_deep(head: bytes) -> bool:
    return head.startswith((b"\x89PNG", b"II", b"MM"))


def _largest_of(data: bytes) -> int | None:
    try:
        deep = _may_be_deep(data) and describe(data).endswith("grey 16-bit")
        return round(float(decode(data).max()) * 65535) if deep else None
    except BadImage:
        return None
