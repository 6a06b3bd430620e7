"""Training images and their order.

Nothing here has state that a crash could lose: the images and the noise of a step follow from (seed, stage, step) and
from the row in the global batch alone. So a training that is resumed, or runs on another number of workers, sees the
same data in the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Mapping, Sequence
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

MAX_DRAWN_WHOLE = 64  # images of a global batch, whose noise takes 17 ms at 512 px


class ImageSet:
    """The images of a data set at the model's resolution, as uint8 [size, size].

    If all of them fit into ``megabytes``, they are loaded at once and unreadable ones are removed; otherwise they are
    read in each step. ``unreadable`` maps the path of an unreadable image to the reason.
    """

    def __init__(self, dataset: Dataset, size: int, megabytes: int = 1024) -> None:
        self.store, self.size, self.bits = dataset.store, size, dataset.bits
        self.images, self.shapes = list(dataset.images), dataset.shapes
        self.unreadable: dict[str, str] = {}
        self._hashes: dict[str, str] = {}
        self.cached = len(self.images) * size * size <= megabytes * 2**20
        self._memory: dict[int, Pixels] = {}
        if self.cached:
            with ThreadPoolExecutor(8) as pool:
                loaded = list(pool.map(self._load, range(len(self.images))))
            good = [n for n, pixels in enumerate(loaded) if pixels is not None]
            self.images = [self.images[n] for n in good]
            self._memory = {index: pixels for index, n in enumerate(good) if (pixels := loaded[n]) is not None}

    def _load(self, index: int) -> Pixels | None:
        """Read one image; None, with an entry in ``unreadable``, if that fails."""
        image = self.images[index]
        try:
            data = self.store.read(image.path)
            self._hashes[image.path] = hashlib.sha256(data).hexdigest()
            pixels = quantise(decode_square(data, self.size, bits=self.bits)[0])
            return np.ascontiguousarray(pixels[:, ::-1]) if image.mirrored else pixels
        except (BadImage, OSError) as error:
            self.unreadable[image.path] = str(error)
            return None

    def read_sha256(self) -> set[str]:
        """Return the sha256 (hex) of the image files that this process has read, without reading any."""
        return set(self._hashes.values())

    def pixels(self, index: int) -> Pixels:
        """Return one image [size, size]; an unreadable one is replaced by the next readable image of its class."""
        if index in self._memory:
            return self._memory[index]
        label = self.images[index].label
        members = [n for n, image in enumerate(self.images) if image.label == label]
        start = members.index(index)
        for candidate in members[start:] + members[:start]:
            pixels = self._load(candidate)
            if pixels is not None:
                return pixels
        raise UnusableData(f"no readable image of class {label}")

    def stack(self, indices: Sequence[int]) -> torch.Tensor:
        """Return images, uint8 [n, size, size]."""
        if self.cached:  # images in memory need no threads
            squares = [self.pixels(index) for index in indices]
        else:
            with ThreadPoolExecutor(8) as pool:
                squares = list(pool.map(self.pixels, indices))
        return torch.from_numpy(np.stack(squares))

    def batch(self, indices: Sequence[int]) -> torch.Tensor:
        """Return images, float32 [n, size, size] in [0, 1]."""
        return grey(self.stack(indices))


def grey(pixels: torch.Tensor) -> torch.Tensor:
    """Convert uint8 images to float32 in [0, 1], on their device."""
    return pixels.float() / 255


class ImageOrder:
    """The endless sequence of a stage's training images; ``order[position]`` is an image index.

    Classes alternate in a fixed pattern by ``weights`` (empty: all classes equally). Within a class, one seeded
    permutation follows the other, so that every image comes once before any comes twice. Images whose index is in
    ``held_out`` are left out. Raises UnusableData for a class that has no image.
    """

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
        cycle, offset = divmod(position, len(self.pattern))
        label = self.pattern[offset]
        members = self.members[label]
        seen = cycle * self.pattern.count(label) + self.pattern[:offset].count(label)
        epoch, rank = divmod(seen, len(members))
        return members[int(_permutation(self.seed, label, epoch, len(members))[rank])]


def _interleave(weights: Mapping[str, int]) -> list[str]:
    """Repeat each label ``weight`` times, spread evenly: Normal 2, COVID 1 -> Normal COVID Normal."""
    placed = [((n + 0.5) / weight, label) for label, weight in weights.items() for n in range(weight)]
    return [label for _, label in sorted(placed)]


@lru_cache(maxsize=256)
def _permutation(seed: int, label: str, epoch: int, n: int) -> NDArray[np.int64]:
    return np.random.default_rng(int(digest([seed, label, epoch])[:16], 16)).permutation(n)


def step_generator(seed: int, stage: str, step: int) -> torch.Generator:
    """Return the CPU generator for everything random in one step."""
    return torch.Generator("cpu").manual_seed(int(digest([seed, stage, step])[:16], 16) >> 1)


class RandomRows:
    """Random numbers for ``rows`` of a global batch of ``size`` images: functions of the step and the row, so that
    shares of any size, on any number of workers, get the same ones.

    A batch of up to MAX_DRAWN_WHOLE images is drawn whole from the step's generator, of which the rows are taken. In a
    larger batch every row has its own generator, so that the work of a worker does not grow with their number.
    """

    def __init__(self, step: torch.Generator, size: int, rows: Sequence[int]) -> None:
        self.size, self.rows = size, list(rows)
        self.whole = size <= MAX_DRAWN_WHOLE
        seeds = [] if self.whole else [digest([step.initial_seed(), row]) for row in rows]
        self.generators = [torch.Generator("cpu").manual_seed(int(seed[:16], 16) >> 1) for seed in seeds] or [step]

    def normal(self, *shape: int) -> torch.Tensor:
        """Return standard normal noise [rows, *shape]."""
        return self._drawn(lambda n, generator: torch.randn(n, *shape, generator=generator))

    def uniform(self, *shape: int) -> torch.Tensor:
        """Return uniform numbers [rows, *shape] in [0, 1)."""
        return self._drawn(lambda n, generator: torch.rand(n, *shape, generator=generator))

    def integers(self, limit: int) -> torch.Tensor:
        """Return uniform integers [rows], from 0 to ``limit`` - 1."""
        return self._drawn(lambda n, generator: torch.randint(0, limit, (n,), generator=generator))

    def _drawn(self, draw: Callable[[int, torch.Generator], torch.Tensor]) -> torch.Tensor:
        if self.whole:
            return draw(self.size, self.generators[0])[self.rows]
        return torch.cat([draw(1, generator) for generator in self.generators])
