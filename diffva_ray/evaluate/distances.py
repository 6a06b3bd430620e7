"""Distances between sets of images: features where they are missing, then FID (or a stand-in's distance) and KID."""

from __future__ import annotations

import io
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from diffva_ray.data.dataset import LabelledImage, UnusableData
from diffva_ray.data.images import BadImage, decode, to_square
from diffva_ray.evaluate.records import stored_records
from diffva_ray.evaluate.run_index import RunIndex, ShardRef
from diffva_ray.generate.committed import OVERLAYS
from diffva_ray.generate.run import Run, find_run, part
from diffva_ray.metrics.feature_set import Features, FeatureSet, npz, release
from diffva_ray.metrics.fid import delete_group_jackknife, frechet_distance_features, matched
from diffva_ray.metrics.fid_controls import infinity, split_halves
from diffva_ray.metrics.kid import kid
from diffva_ray.metrics.manifold import prdc
from diffva_ray.schema import digest
from diffva_ray.storage.store import Store, StoreError, join, opened

if TYPE_CHECKING:  # it loads torch, which a driver that only plans has no use for
    from diffva_ray.metrics.features import Extractor

Row = dict[str, Any]
CHUNK = 512  # images of a reference set in one file
TOGETHER = 64  # chunks that are read ahead, and written before a scratch file's pages are given back
IN_MEMORY = 1 << 26  # numbers of a feature matrix (256 MiB), above which it waits on disk
Arrays = dict[str, NDArray[np.float32]]
NEIGHBOURS = 5  # k of precision, recall, density and coverage


@dataclass(frozen=True)
class RunFeatures:
    """Features of a run's ``ok`` records, row by row those of its index_run: of images and of their counterfactuals."""

    source: FeatureSet
    counterfactual: FeatureSet


class FeatureChunk(Protocol):
    """Images whose features make one file, the unit of work of an ``Embed``."""

    def stored(self, extractor: Extractor) -> Arrays | None:
        """The file's arrays; None where it is missing, damaged or of other images."""

    def fill(self, extractor: Extractor) -> None:
        """Compute and write the file. Raises UnusableData for an image that cannot be read and is needed."""


@dataclass(frozen=True)
class ShardFeatures:
    """The images and counterfactuals that one shard holds, in its order."""

    run: str
    shard_ref: ShardRef
    ids: NDArray[np.bytes_]

    @property
    def folder(self) -> str:
        return f"{OVERLAYS}/r{self.shard_ref[0]}/" if self.shard_ref[0] else ""

    def stored(self, extractor: Extractor) -> Arrays | None:
        """What the shard's worker stored (the stand-in's), or an earlier reduce."""
        names = {kind: f"{extractor.name}/{kind}" for kind in ("source", "counterfactual")}
        own = f"{self.folder}features/{part(self.shard_ref[1])}.npz"
        ids = self.ids.astype(str).tolist()
        found = read_npz(self.run, own, ids, names) if extractor.is_stand_in else None
        return found or read_npz(self.run, self._kept(extractor), ids, names)

    def fill(self, extractor: Extractor) -> None:
        run = find_run(opened(self.run))
        assert run is not None
        bits = run.recipe.data.bits
        data, size, ids = opened(run.about["data_root"]), run.recipe.model.resolution, self.ids.astype(str)
        rows = {row["record_id"]: row for row in stored_records(run, self.shard_ref)}
        images = [rows[record]["image_path"] for record in ids]
        counterfactuals = [rows[record]["counterfactual_path"] for record in ids]
        again = f"withdraw its shard with diffva verify {self.run} --repair and generate it again"
        arrays = {
            "ids": ids,
            f"{extractor.name}/source": _needed(extractor, data, images, size, "put it back where it was", bits),
            f"{extractor.name}/counterfactual": _needed(extractor, run.store, counterfactuals, size, again),
        }
        run.store.put(self._kept(extractor), npz(arrays))

    def _kept(self, extractor: Extractor) -> str:
        return f"{self.folder}features/{cache_key(extractor)}/{part(self.shard_ref[1])}.npz"


@dataclass(frozen=True)
class ReferenceFeatures:
    """Images of a reference set, kept in ``cache`` by place and sizes of the images; those that cannot be read are left
    out."""

    cache: str
    data: str
    images: tuple[LabelledImage, ...]
    size: int  # of the grid that images are taken to
    bits: int = 16  # of its 16-bit grey files

    def stored(self, extractor: Extractor) -> Arrays | None:
        return read_npz(
            self.cache, self._kept(extractor), [image.path for image in self.images], {"features": "features"}
        )

    def fill(self, extractor: Extractor) -> None:
        data = opened(self.data)
        images = [partial(data.read, image.path) for image in self.images]
        arrays = {
            "ids": np.array([image.path for image in self.images]),
            "features": embed(extractor, images, self.size, self.bits, lenient=True),
        }
        opened(self.cache).put(self._kept(extractor), npz(arrays))

    def _kept(self, extractor: Extractor) -> str:
        depth = [] if self.bits == 16 else [self.bits]
        name = digest([self.data, self.size, [(image.path, image.size) for image in self.images], *depth])[:16]
        return f"features/{cache_key(extractor)}/reference-{name}.npz"


Embed = Callable[["Extractor", Sequence[FeatureChunk]], None]  # fills chunks, here or on a cluster


def embed_here(extractor: Extractor, chunks: Sequence[FeatureChunk]) -> None:
    for chunk in chunks:
        chunk.fill(extractor)


def run_features(
    run: Run,
    records: RunIndex,
    extractor: Extractor,
    spread: Embed = embed_here,
    chosen: NDArray[np.bool_] | None = None,
) -> RunFeatures:
    """Features of a run's ``ok`` records: those the shards stored (the stand-in's), those of an earlier reduce, and
    computed (and kept) where missing. They wait in a scratch file, not in memory. ``chosen``: records that are wanted
    (a mask); shards that hold none of them are left out, and their rows are zero."""
    shards_of = {
        shard_ref: rows for shard_ref, rows in records.shards_of.items() if chosen is None or chosen[rows].any()
    }
    chunks = [ShardFeatures(run.store.uri, shard_ref, records.ids[rows]) for shard_ref, rows in shards_of.items()]
    images, counterfactuals = (scratch(len(records.ids), extractor.dimension) for _ in range(2))
    localization = list(shards_of.values())
    for done, (number, arrays) in enumerate(filled(chunks, extractor, spread)):
        images[localization[number]], counterfactuals[localization[number]] = arrays["source"], arrays["counterfactual"]
        if done % TOGETHER == 0:
            release(images)
            release(counterfactuals)
    return RunFeatures(FeatureSet(images), FeatureSet(counterfactuals))


def scratch(rows: int, dimension: int) -> NDArray[np.float32]:
    """A matrix in a file that nobody else sees and that goes with it; in memory where it is small. Raises StoreError
    where the disk has no room for it."""
    if rows * dimension <= IN_MEMORY:
        return np.zeros((rows, dimension), np.float32)
    with tempfile.TemporaryFile(prefix="diffva-features-") as file:
        try:  # a file with holes would end the process, without a word, when the disk is full
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, 4 * rows * dimension)
            file.truncate(4 * rows * dimension)
        except OSError as error:
            raise StoreError(
                f"{tempfile.gettempdir()} has no room for {4 * rows * dimension / 1e9:.1f} GB of features "
                f"({error.strerror}); set TMPDIR to a folder that has",
                lasting=True,
            ) from None
        return np.memmap(file, np.float32, "r+", shape=(rows, dimension))


def filled(chunks: Sequence[FeatureChunk], extractor: Extractor, spread: Embed) -> Iterator[tuple[int, Arrays]]:
    """Every chunk's place and arrays: first those that are stored, then those that had to be computed."""
    missing = []
    for number, arrays in _stored(chunks, range(len(chunks)), extractor):
        if arrays is None:
            missing.append(number)
        else:
            yield number, arrays
    if missing:
        spread(extractor, [chunks[number] for number in missing])
    for number, arrays in _stored(chunks, missing, extractor):
        if arrays is None:
            raise OSError(f"features that were written a moment ago are gone or damaged: {chunks[number]}")
        yield number, arrays


def _stored(
    chunks: Sequence[FeatureChunk], numbers: Sequence[int], extractor: Extractor
) -> Iterator[tuple[int, Arrays | None]]:
    """What is stored of some chunks, in order; a few are read ahead."""
    with ThreadPoolExecutor(8) as pool:
        for start in range(0, len(numbers), TOGETHER):
            some = numbers[start : start + TOGETHER]
            yield from zip(some, pool.map(lambda number: chunks[number].stored(extractor), some), strict=True)


def read_npz(store: str, path: str, ids: list[str], names: Mapping[str, str]) -> Arrays | None:
    """The arrays ``names`` (name here -> name in the file) of features of exactly ``ids``."""
    try:
        found = np.load(io.BytesIO(opened(store).read(path)))
        return {name: found[there] for name, there in names.items()} if list(found["ids"]) == ids else None
    except (FileNotFoundError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def cache_key(extractor: Extractor) -> str:
    """Folder name of an extractor's features: they are only as good as its weights and resize path."""
    return f"{extractor.name}-{extractor.resize}-{extractor.weights_sha256[:8]}"


def embed(
    extractor: Extractor, readers: Iterable[Callable[[], bytes]], size: int, bits: int = 16, lenient: bool = False
) -> NDArray[np.float32]:
    """Features [n, d] of image files. ``legacy`` takes each file at its stored size, everything else on the model's
    square grid. Raises BadImage or OSError for an unreadable one; ``lenient`` leaves it out."""
    found: list[NDArray[np.float32]] = []
    waiting: list[NDArray[np.float32]] = []

    def flush() -> None:
        if waiting:
            found.append(extractor(np.stack(waiting)))
            waiting.clear()

    for read in readers:
        try:
            image = decode(read(), bits=bits)
        except (BadImage, OSError):
            if lenient:
                continue
            raise
        if extractor.resize != "legacy":
            image = to_square(image, size)
        if (waiting and waiting[0].shape != image.shape) or len(waiting) == extractor.micro_batch:
            flush()
        waiting.append(image)
    flush()
    return np.concatenate(found) if found else np.zeros((0, extractor.dimension), np.float32)


def _needed(
    extractor: Extractor, store: Store, paths: Sequence[str], size: int, advice: str, bits: int = 16
) -> NDArray[np.float32]:
    """``embed`` of files none of which can be left out. Raises UnusableData, which names one that cannot be read."""
    path = ""

    def readers() -> Iterator[Callable[[], bytes]]:
        nonlocal path
        for path in paths:
            yield partial(store.read, path)

    try:
        return embed(extractor, readers(), size, bits)
    except (BadImage, OSError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error
        raise UnusableData(
            f"{join(store.uri, path)}: needed for features and cannot be read any more ({reason}); {advice}"
        ) from None


def reference_features(
    cache: Store, size: int, store: Store, images: Sequence[LabelledImage], extractor: Extractor,
    spread: Embed = embed_here, bits: int = 16,
) -> tuple[FeatureSet, int]:  # fmt: skip
    """Features of a reference set on the model's ``size``, kept in ``cache`` (a run, or what several runs share) and
    found again by place and sizes of the images; and how many images were unreadable."""
    chunks = [
        ReferenceFeatures(cache.uri, store.uri, tuple(images[start : start + CHUNK]), size, bits)
        for start in range(0, len(images), CHUNK)
    ]
    features, read = scratch(len(images), extractor.dimension), np.zeros(len(images), bool)
    for done, (number, arrays) in enumerate(filled(chunks, extractor, spread)):
        here = slice(number * CHUNK, number * CHUNK + len(arrays["features"]))
        features[here], read[here] = arrays["features"], True
        if done % TOGETHER == 0:
            release(features)
    return FeatureSet(features, np.flatnonzero(read)), int((~read).sum())


def distance_row(
    first: str, second: str, x: Features, y: Features, extractor: Extractor, groups: int, paired: bool = False
) -> Row | None:
    """One row of the distance table; None when a set has fewer than four images.

    ``paired``: row i of both sets is one image and its counterfactual; then ``halves`` says what the distance is when
    no image meets its own edit. ``manifold`` and ``infinity`` are absent where the sets are too small for them.
    """
    if min(len(x), len(y)) < 4:
        return None
    value, error = kid(x, y)
    mean, deviation = matched(x, y, draws=5)
    row: Row = {
        "set1": first,
        "set2": second,
        "n1": len(x),
        "n2": len(y),
        "value": frechet_distance_features(x, y),
        "extractor": extractor.name,
        "dimension": extractor.dimension,
        "is_stand_in": extractor.is_stand_in,
        "weights_sha256": extractor.weights_sha256,
        "resize": extractor.resize,
        "interval": list(delete_group_jackknife(x, y, groups, paired=paired)),
        "n_matched": {"n": min(len(x), len(y)), "mean": mean, "sd": deviation},
        "kid": {"value": value, "standard_error": error},
    }
    smaller = min(len(x), len(y))
    if smaller > NEIGHBOURS:
        row["manifold"] = {"k": NEIGHBOURS, **asdict(prdc(x, y, NEIGHBOURS))}
    if smaller >= 8:
        row["infinity"] = asdict(infinity(x, y, draws=2))
        if paired:
            row["halves"] = asdict(split_halves(x, y, splits=2))
    return row
