"""Distances between sets of images: computes missing features, then FID (or the Fréchet distance of random-feature
extractors) and KID."""

from __future__ import annotations

import io
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from diffva_ray.data.dataset import LabelledImage, UnusableData
from diffva_ray.data.images import BadImage, decode, to_square
from diffva_ray.evaluate.records import read_source, stored_records
from diffva_ray.evaluate.run_index import RunIndex, ShardRef
from diffva_ray.generate.run import Run, find_run, part
from diffva_ray.generate.run_json import OVERLAYS
from diffva_ray.generate.shard_files import stored_features_path
from diffva_ray.metrics.feature_set import Features, FeatureSet, npz, release
from diffva_ray.metrics.fid import delete_group_jackknife, frechet_distance_features, matched
from diffva_ray.metrics.fid_controls import infinity, split_halves
from diffva_ray.metrics.kid import kid
from diffva_ray.metrics.manifold import prdc
from diffva_ray.schema import TableRow, digest
from diffva_ray.storage.opening import opened
from diffva_ray.storage.store import Store, StoreError, join

if TYPE_CHECKING:  # loads torch, which a driver that only plans does not need
    from diffva_ray.metrics.features import Extractor

CHUNK_SIZE = 512  # images of a reference set in one file
READAHEAD_CHUNKS = 64  # also the number of chunks after which a scratch file's pages are released
MAX_NUMBERS_IN_MEMORY = 1 << 26  # of a feature matrix (256 MiB); a larger one is a file on disk
Arrays = dict[str, NDArray[np.float32]]
NEIGHBOURS = 5  # k of precision, recall, density and coverage


@dataclass(frozen=True)
class RunFeatures:
    """Features of a run's ``ok`` records; row n is row n of ``RunIndex.frame``."""

    source: FeatureSet  # of the input images
    counterfactual: FeatureSet


class FeatureChunk(Protocol):
    """Images whose features are stored in one file; the unit of work of an ``Embed``."""

    def stored(self, extractor: Extractor) -> Arrays | None:
        """Read the file's arrays; None if it is missing, damaged or has the features of other images."""

    def fill(self, extractor: Extractor) -> None:
        """Compute and write the file. Raises UnusableData for a required image that cannot be read."""


@dataclass(frozen=True)
class ShardFeatures:
    """The images and counterfactuals of one shard, in the shard's order."""

    run: str  # address of the run
    shard_ref: ShardRef
    ids: NDArray[np.bytes_]  # record ids

    @property
    def folder(self) -> str:
        """Folder of the run or of its retry, relative to the run."""
        return f"{OVERLAYS}/r{self.shard_ref[0]}/" if self.shard_ref[0] else ""

    def stored(self, extractor: Extractor) -> Arrays | None:
        """Read the features stored by the shard's worker (random-feature extractor) or by an earlier reduce."""
        names = {kind: f"{extractor.name}/{kind}" for kind in ("source", "counterfactual")}
        ids, arrays = self.ids.astype(str).tolist(), None
        if extractor.is_stand_in:
            own = stored_features_path(opened(self.run), self.shard_ref[1], self.folder)
            arrays = read_npz(self.run, own, ids, names)
        return arrays or read_npz(self.run, self._path(extractor), ids, names)

    def fill(self, extractor: Extractor) -> None:
        run = find_run(opened(self.run))
        assert run is not None
        bits = run.recipe.data.bits
        data, size, ids = opened(run.about["data_root"]), run.recipe.model.resolution, self.ids.astype(str)
        by_id = {row["record_id"]: row for row in stored_records(run, self.shard_ref)}
        rows = [by_id[record] for record in ids]
        images = [(join(data.uri, row["image_path"]), partial(read_source, data, row)) for row in rows]
        paths = [row["counterfactual_path"] for row in rows]
        counterfactuals = [(join(run.store.uri, path), partial(run.store.read, path)) for path in paths]
        advice = f"give diffva verify {self.run} --repair and generate its shard again"
        arrays = {
            "ids": ids,
            f"{extractor.name}/source": _embed_all(extractor, images, size, "restore the file", bits),
            f"{extractor.name}/counterfactual": _embed_all(extractor, counterfactuals, size, advice),
        }
        run.store.put(self._path(extractor), npz(arrays))

    def _path(self, extractor: Extractor) -> str:
        return f"{self.folder}features/{cache_key(extractor)}/{part(self.shard_ref[1])}.npz"


@dataclass(frozen=True)
class ReferenceFeatures:
    """Images of a reference set; images that cannot be read are left out.

    The file name has a digest of the addresses and sizes of the images."""

    cache: str  # address of the store with the features
    data: str  # address of the data set
    images: tuple[LabelledImage, ...]
    size: int  # side of the square grid to which images are resized
    bits: int = 16  # used bits of the 16-bit grey files

    def stored(self, extractor: Extractor) -> Arrays | None:
        return read_npz(
            self.cache, self._path(extractor), [image.path for image in self.images], {"features": "features"}
        )

    def fill(self, extractor: Extractor) -> None:
        data = opened(self.data)
        images = [partial(data.read, image.path) for image in self.images]
        arrays = {
            "ids": np.array([image.path for image in self.images]),
            "features": embed(extractor, images, self.size, self.bits, lenient=True),
        }
        opened(self.cache).put(self._path(extractor), npz(arrays))

    def _path(self, extractor: Extractor) -> str:
        depth = [] if self.bits == 16 else [self.bits]
        name = digest([self.data, self.size, [(image.path, image.size) for image in self.images], *depth])[:16]
        return f"features/{cache_key(extractor)}/reference-{name}.npz"


Embed = Callable[["Extractor", Sequence[FeatureChunk]], None]  # fills chunks, in this process or on a cluster


def embed_here(extractor: Extractor, chunks: Sequence[FeatureChunk]) -> None:
    """Fill chunks in this process."""
    for chunk in chunks:
        chunk.fill(extractor)


def run_features(
    run: Run,
    records: RunIndex,
    extractor: Extractor,
    spread: Embed = embed_here,
    chosen: NDArray[np.bool_] | None = None,
) -> RunFeatures:
    """Features of a run's ``ok`` records: stored ones where they exist, else computed and stored.

    Large matrices are in a scratch file, not in memory. ``chosen``: mask of the wanted records; rows of shards without
    any of them stay zero."""
    shards_of = {
        shard_ref: rows for shard_ref, rows in records.shards_of.items() if chosen is None or chosen[rows].any()
    }
    chunks = [ShardFeatures(run.store.uri, shard_ref, records.ids[rows]) for shard_ref, rows in shards_of.items()]
    images, counterfactuals = (scratch(len(records.ids), extractor.dimension) for _ in range(2))
    rows_of = list(shards_of.values())
    for done, (number, arrays) in enumerate(filled(chunks, extractor, spread)):
        images[rows_of[number]], counterfactuals[rows_of[number]] = arrays["source"], arrays["counterfactual"]
        if done % READAHEAD_CHUNKS == 0:
            release(images)
            release(counterfactuals)
    return RunFeatures(FeatureSet(images), FeatureSet(counterfactuals))


def scratch(rows: int, dimension: int) -> NDArray[np.float32]:
    """A zero matrix in memory, or in an unnamed temporary file above MAX_NUMBERS_IN_MEMORY. Raises StoreError when the
    disk is full."""
    if rows * dimension <= MAX_NUMBERS_IN_MEMORY:
        return np.zeros((rows, dimension), np.float32)
    with tempfile.TemporaryFile(prefix="diffva-features-") as file:
        try:  # allocate now: writing to a sparse file on a full disk would kill the process
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, 4 * rows * dimension)
            file.truncate(4 * rows * dimension)
        except OSError as error:
            raise StoreError(
                f"{tempfile.gettempdir()} has no room for {4 * rows * dimension / 1e9:.1f} GB of features "
                f"({error.strerror}); set TMPDIR to a folder with enough room",
                lasting=True,
            ) from None
        return np.memmap(file, np.float32, "r+", shape=(rows, dimension))


def filled(chunks: Sequence[FeatureChunk], extractor: Extractor, spread: Embed) -> Iterator[tuple[int, Arrays]]:
    """Yields (index of the chunk, arrays): first the stored chunks, then the computed ones."""
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
            raise OSError(f"features that were just written are missing or damaged: {chunks[number]}")
        yield number, arrays


def _stored(
    chunks: Sequence[FeatureChunk], numbers: Sequence[int], extractor: Extractor
) -> Iterator[tuple[int, Arrays | None]]:
    """Yields (index, stored arrays or None) of the chunks ``numbers`` in order; READAHEAD_CHUNKS are read at a time."""
    with ThreadPoolExecutor(8) as pool:
        for start in range(0, len(numbers), READAHEAD_CHUNKS):
            batch = numbers[start : start + READAHEAD_CHUNKS]
            yield from zip(batch, pool.map(lambda number: chunks[number].stored(extractor), batch), strict=True)


def read_npz(store: str, path: str, ids: list[str], names: Mapping[str, str]) -> Arrays | None:
    """Read arrays of an NPZ file; None unless it can be read and has the features of exactly ``ids``.

    ``names``: name in the file by name in the result."""
    try:
        file = np.load(io.BytesIO(opened(store).read(path)))
        return {name: file[stored] for name, stored in names.items()} if list(file["ids"]) == ids else None
    except (FileNotFoundError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def cache_key(extractor: Extractor) -> str:
    """Folder name of an extractor's features, which depend on its weights and its resize path."""
    return f"{extractor.name}-{extractor.resize}-{extractor.weights_sha256[:8]}"


def embed(
    extractor: Extractor, readers: Iterable[Callable[[], bytes]], size: int, bits: int = 16, lenient: bool = False
) -> NDArray[np.float32]:
    """Features [n, d] of image files, as [``size``, ``size``] or, with resize path ``legacy``, at their stored sizes.

    Raises BadImage or OSError for an unreadable file; with ``lenient`` the file is left out."""
    features: list[NDArray[np.float32]] = []
    batch: list[NDArray[np.float32]] = []

    def flush() -> None:
        if batch:
            features.append(extractor(np.stack(batch)))
            batch.clear()

    for read in readers:
        try:
            image = decode(read(), bits=bits)
        except (BadImage, OSError):
            if lenient:
                continue
            raise
        if extractor.resize != "legacy":
            image = to_square(image, size)
        if (batch and batch[0].shape != image.shape) or len(batch) == extractor.micro_batch:
            flush()
        batch.append(image)
    flush()
    return np.concatenate(features) if features else np.zeros((0, extractor.dimension), np.float32)


def _embed_all(
    extractor: Extractor, files: Sequence[tuple[str, Callable[[], bytes]]], size: int, advice: str, bits: int = 16
) -> NDArray[np.float32]:
    """``embed`` where every file (address, reader) is required. Raises UnusableData that names an unreadable one, with
    ``advice``."""
    address = ""

    def readers() -> Iterator[Callable[[], bytes]]:
        nonlocal address
        for file in files:
            address, read = file
            yield read

    try:
        return embed(extractor, readers(), size, bits)
    except (BadImage, OSError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error
        raise UnusableData(f"{address}: needed for features and cannot be read any more ({reason}); {advice}") from None


def reference_features(
    cache: Store, size: int, store: Store, images: Sequence[LabelledImage], extractor: Extractor,
    spread: Embed = embed_here, bits: int = 16,
) -> tuple[FeatureSet, int]:  # fmt: skip
    """Features of a reference set, and the number of its unreadable images.

    ``cache``: where features are stored (a run, or a folder shared by runs); ``size``: side of the model's grid;
    ``bits``: used bits of 16-bit files."""
    chunks = [
        ReferenceFeatures(cache.uri, store.uri, tuple(images[start : start + CHUNK_SIZE]), size, bits)
        for start in range(0, len(images), CHUNK_SIZE)
    ]
    features, read = scratch(len(images), extractor.dimension), np.zeros(len(images), bool)
    for done, (number, arrays) in enumerate(filled(chunks, extractor, spread)):
        rows = slice(number * CHUNK_SIZE, number * CHUNK_SIZE + len(arrays["features"]))
        features[rows], read[rows] = arrays["features"], True
        if done % READAHEAD_CHUNKS == 0:
            release(features)
    return FeatureSet(features, np.flatnonzero(read)), int((~read).sum())


def distance_row(
    first: str, second: str, x: Features, y: Features, extractor: Extractor, groups: int, paired: bool = False
) -> TableRow | None:
    """One row of the distance table; None when a set has fewer than four images.

    ``paired``: row i of both sets is one image and its counterfactual; then ``halves`` has the distance between halves
    in which no image meets its own counterfactual. ``manifold`` and ``infinity`` are absent for small sets.
    ``interval`` is None where a set has no more images than features: the jackknife's does not cover the truth there.
    """
    smaller = min(len(x), len(y))
    if smaller < 4:
        return None
    value, error = kid(x, y)
    mean, deviation = matched(x, y, draws=5)
    row: TableRow = {
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
        "interval": list(delete_group_jackknife(x, y, groups, paired=paired))
        if smaller > extractor.dimension
        else None,
        "n_matched": {"n": smaller, "mean": mean, "sd": deviation},
        "kid": {"value": value, "standard_error": error},
    }
    if smaller > NEIGHBOURS:
        row["manifold"] = {"k": NEIGHBOURS, **asdict(prdc(x, y, NEIGHBOURS))}
    if smaller >= 8:
        row["infinity"] = asdict(infinity(x, y, draws=2))
        if paired:
            row["halves"] = asdict(split_halves(x, y, splits=2))
    return row
