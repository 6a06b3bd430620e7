"""Training images and the order in which they are seen.

Nothing here has state that a crash could lose: which images a step sees, and all of its noise, follow from (seed,
stage, step) alone, for the global batch; a worker takes its slice. So a resumed run, or one on another number of
workers, sees the same data in the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from diffva_ray.data.dataset import Dataset, LabelledImage, UnusableData
from diffva_ray.data.encoding import quantise
from diffva_ray.data.images import BadImage, decode_square
from diffva_ray.schema import digest

Pixels = NDArray[np.uint8]


class ImageSet:
    """The images of a data set at the model's resolution, as uint8 squares; kept in memory up to ``megabytes``."""

    def __init__(self, dataset: Dataset, size: int, megabytes: int = 1024) -> None:
        self.store, self.size, self.bits = dataset.store, size, dataset.bits
        self.images = list(dataset.images)
        self.unreadable: dict[str, str] = {}
        self._hashes: dict[str, str] = {}
        self.cached = len(self.images) * size * size <= megabytes * 2**20
        self._memory: dict[int, Pixels] = {}
        if self.cached:
            with ThreadPoolExecutor(8) as pool:
                loaded = list(pool.map(self._load, range(len(self.images))))
            good = [n for n, pixels in enumerate(loaded) if pixels is not None]
            self.images = [self.images[n] for n in good]
            self._memory = {at: pixels for at, n in enumerate(good) if (pixels := loaded[n]) is not None}

    def _load(self, index: int) -> Pixels | None:
        image = self.images[index]
        try:
            data = self.store.read(image.path)
            self._hashes[image.path] = hashlib.sha256(data).hexdigest()
            return quantise(decode_square(data, self.size, bits=self.bits)[0])
        except (BadImage, OSError) as error:
            self.unreadable[image.path] = str(error)
            return None

    def sha256(self) -> list[str]:
        """sha256 (hex) of every readable image's file, sorted; images that no step has read yet are read now."""
        unread = [n for n, image in enumerate(self.images) if image.path not in self._hashes]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(self._load, unread))
        return sorted({self._hashes[image.path] for image in self.images if image.path in self._hashes})

    def of_class(self, label: str) -> list[int]:
        return [n for n, image in enumerate(self.images) if image.label == label]

    def pixels(self, index: int) -> Pixels:
        """One image [size, size]; an unreadable one is replaced by the next readable image of its class."""
        if index in self._memory:
            return self._memory[index]
        same = self.of_class(self.images[index].label)
        for turn in range(len(same)):
            pixels = self._load(same[(same.index(index) + turn) % len(same)])
            if pixels is not None:
                return pixels
        raise UnusableData(f"no readable image of class {self.images[index].label}")

    def batch(self, indices: Sequence[int]) -> torch.Tensor:
        """Images float32 [n, size, size] in [0, 1]."""
        if self.cached:  # every step comes here: no threads for what lies in memory
            squares = [self.pixels(index) for index in indices]
        else:
            with ThreadPoolExecutor(8) as pool:
                squares = list(pool.map(self.pixels, indices))
        return torch.from_numpy(np.stack(squares)).float() / 255


class ImageOrder:
    """Which image stands at position g of a stage's endless sequence: classes in a fixed pattern by weight, and within
    a class one seeded permutation after the other, so that every image is seen once before any is seen twice. Images
    ``held_out`` never come."""

    def __init__(
        self, images: Sequence[LabelledImage], weights: Mapping[str, int], seed: int, held_out: Container[int] = ()
    ) -> None:
        labels = sorted({image.label for image in images})
        weights = {label: weight for label, weight in (weights or dict.fromkeys(labels, 1)).items() if weight > 0}
        absent = [label for label in weights if label not in labels]
        if absent:
            raise UnusableData(f"training class {absent[0]!r} is not in the data; there are {', '.join(labels)}")
        self.seed = seed
        self.members = {
            label: [n for n, image in enumerate(images) if image.label == label and n not in held_out]
            for label in weights
        }
        self.pattern = _interleave(weights)

    def __getitem__(self, position: int) -> int:
        cycle, place = divmod(position, len(self.pattern))
        label = self.pattern[place]
        seen = cycle * self.pattern.count(label) + self.pattern[:place].count(label)
        epoch, turn = divmod(seen, len(self.members[label]))
        return self.members[label][_permutation(self.seed, label, epoch, len(self.members[label]))[turn]]


def _interleave(weights: Mapping[str, int]) -> list[str]:
    """Each label ``weight`` times, spread evenly: Normal 2, COVID 1 -> Normal COVID Normal."""
    placed = [((turn + 0.5) / weight, label) for label, weight in weights.items() for turn in range(weight)]
    return [label for _, label in sorted(placed)]


@lru_cache(maxsize=256)
def _permutation(seed: int, label: str, epoch: int, n: int) -> NDArray[np.int64]:
    return np.random.default_rng(int(digest([seed, label, epoch])[:16], 16)).permutation(n)


def step_generator(seed: int, stage: str, step: int) -> torch.Generator:
    """The CPU generator of everything random in one step."""
    return torch.Generator("cpu").manual_seed(int(digest([seed, stage, step])[:16], 16) >> 1)
