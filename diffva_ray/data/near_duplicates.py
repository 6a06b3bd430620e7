"""Finds pairs of images that look alike, by difference hashes of 256 bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations

import numpy as np
from PIL import Image

from diffva_ray.data.encoding import quantise

HASH_SIDE = 16  # cells; a hash has 16 x 16 bits
NEAR = 8  # maximum distance in bits; measured: 0 to 8 for one image in two resolutions, 20 or more for different images
METHOD = f"difference hash {HASH_SIDE}x{HASH_SIDE}, at most {NEAR} of {HASH_SIDE**2} bits apart"


def difference_hash(image: np.ndarray) -> int:
    """256-bit hash of float grey [H, W]: whether each cell of a 17 x 16 grid of means is darker than its right one."""
    grid = Image.fromarray(quantise(image)).resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX)
    cells = np.asarray(grid, np.int16)
    return int.from_bytes(np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes(), "big")


def near_duplicates(hashes: Mapping[str, int]) -> list[tuple[str, str, int]]:
    """Sorted pairs of paths whose hashes are at most NEAR bits apart, and their distance.

    Of paths with equal hashes, each is paired with the first only: a thousand copies give 999 pairs.
    """
    paths: dict[int, list[str]] = {}
    for path, value in sorted(hashes.items()):
        paths.setdefault(value, []).append(path)
    pairs = [(same[0], copy, 0) for same in paths.values() for copy in same[1:]]
    for first, second in _close(paths):
        one, two = sorted((paths[first][0], paths[second][0]))
        pairs.append((one, two, (first ^ second).bit_count()))
    return sorted(pairs)


def _close(values: Mapping[int, list[str]]) -> Iterator[tuple[int, int]]:
    """Pairs of different values at most NEAR bits apart.

    The bits are divided into NEAR + 1 sets. Two hashes that differ in at most NEAR bits agree on at least one set, so
    only hashes with equal bits in one set are compared. The sets are interleaved, because black borders make
    neighbouring bits equal in all images.
    """
    found = set()
    for part in range(NEAR + 1):
        mask = sum(1 << bit for bit in range(part, HASH_SIDE**2, NEAR + 1))
        buckets: dict[int, list[int]] = {}
        for value in values:
            buckets.setdefault(value & mask, []).append(value)
        for bucket in buckets.values():
            for pair in combinations(bucket, 2):
                if (pair[0] ^ pair[1]).bit_count() <= NEAR and pair not in found:
                    found.add(pair)
                    yield pair
