"""Training films and the order in which they are seen.

Nothing here has state that a crash could lose: which films a step sees, and all of its noise, follow from (seed, stage,
step) alone, for the global batch; a worker takes its slice. So a resumed run, or one on another number of workers, sees
the same data in the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from diffva_ray.data.dataset import Dataset, Film, UnusableData
from diffva_ray.data.encoding import quantise
from diffva_ray.data.images import BadImage, decode_square
from diffva_ray.schema import digest

Pixels = NDArray[np.uint8]


class FilmSet:
    """The films of a data set at the model's resolution, as uint8 squares; kept in memory up to ``megabytes``."""

    def __init__(self, dataset: Dataset, size: int, megabytes: int = 1024) -> None:
        self.store, self.size, self.bits = dataset.store, size, dataset.bits
        self.films = list(dataset.films)
        self.unreadable: dict[str, str] = {}
        self._hashes: dict[str, str] = {}
        self.cached = len(self.films) * size * size <= megabytes * 2**20
        self._memory: dict[int, Pixels] = {}
        if self.cached:
            with ThreadPoolExecutor(8) as pool:
                loaded = list(pool.map(self._load, range(len(self.films))))
            good = [n for n, pixels in enumerate(loaded) if pixels is not None]
            self.films = [self.films[n] for n in good]
            self._memory = {at: pixels for at, n in enumerate(good) if (pixels := loaded[n]) is not None}

    def _load(self, index: int) -> Pixels | None:
        film = self.films[index]
        try:
            data = self.store.read(film.path)
            self._hashes[film.path] = hashlib.sha256(data).hexdigest()
            return quantise(decode_square(data, self.size, bits=self.bits)[0])
        except (BadImage, OSError) as error:
            self.unreadable[film.path] = str(error)
            return None

    def sha256(self) -> list[str]:
        """sha256 (hex) of every readable film's file, sorted; films that no step has read yet are read now."""
        unread = [n for n, film in enumerate(self.films) if film.path not in self._hashes]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(self._load, unread))
        return sorted({self._hashes[film.path] for film in self.films if film.path in self._hashes})

    def of_class(self, label: str) -> list[int]:
        return [n for n, film in enumerate(self.films) if film.label == label]

    def pixels(self, index: int) -> Pixels:
        """One film [size, size]; an unreadable one is replaced by the next readable film of its class."""
        if index in self._memory:
            return self._memory[index]
        same = self.of_class(self.films[index].label)
        for turn in range(len(same)):
            pixels = self._load(same[(same.index(index) + turn) % len(same)])
            if pixels is not None:
                return pixels
        raise UnusableData(f"no readable film of class {self.films[index].label}")

    def batch(self, indices: Sequence[int]) -> torch.Tensor:
        """Films float32 [n, size, size] in [0, 1]."""
        if self.cached:  # every step comes here: no threads for what lies in memory
            squares = [self.pixels(index) for index in indices]
        else:
            with ThreadPoolExecutor(8) as pool:
                squares = list(pool.map(self.pixels, indices))
        return torch.from_numpy(np.stack(squares)).float() / 255


class Draws:
    """Which film stands at position g of a stage's endless sequence: classes in a fixed pattern by weight, and within
    a class one seeded permutation after the other, so that every film is seen once before any is seen twice. Films
    ``held_out`` never come."""

    def __init__(
        self, films: Sequence[Film], weights: Mapping[str, int], seed: int, held_out: Container[int] = ()
    ) -> None:
        labels = sorted({film.label for film in films})
        weights = {label: weight for label, weight in (weights or dict.fromkeys(labels, 1)).items() if weight > 0}
        absent = [label for label in weights if label not in labels]
        if absent:
            raise UnusableData(f"training class {absent[0]!r} is not in the data; there are {', '.join(labels)}")
        self.seed = seed
        self.members = {
            label: [n for n, film in enumerate(films) if film.label == label and n not in held_out] for label in weights
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
