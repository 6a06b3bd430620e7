"""Export on a cluster: each Ray task writes the files with one number, so the files are the same as without Ray."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import ray

from diffva_ray.export.writing import LocalWriter, Work, write_files

MAX_PENDING_TASKS = 256


@ray.remote(num_cpus=1)
def _write_files(work: Work, number: int) -> list[str]:
    return write_files(work, number)


class RayWriter(LocalWriter):
    """Writes files on the connected cluster. A task that ends with its node is repeated: files appear whole."""

    def write(self, work: Work, numbers: Sequence[int]) -> Iterator[list[str]]:
        shared, pending = ray.put(work), deque[Any]()
        try:
            for number in numbers:
                pending.append(_write_files.remote(shared, number))
                if len(pending) == MAX_PENDING_TASKS:
                    yield ray.get(pending.popleft())
            yield from map(ray.get, pending)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None  # the same UnusableData, DamagedPart or StoreError as without Ray
