"""Distances between sets of films: features where they are missing, then FID (or a stand-in's distance) and KID."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffva_ray.data.films import Film
from diffva_ray.data.images import BadImage, decode, to_square
from diffva_ray.evaluate.records import by_shard
from diffva_ray.generate.plan import Run
from diffva_ray.metrics.fid import delete_group_jackknife, frechet_distance_features, matched
from diffva_ray.metrics.fid_controls import infinity, split_halves
from diffva_ray.metrics.kid import kid
from diffva_ray.metrics.manifold import prdc
from diffva_ray.schema import digest
from diffva_ray.storage import Store, open_store

if TYPE_CHECKING:  # it loads torch, which a driver that only plans has no use for
    from diffva_ray.metrics.features import Extractor

Features = NDArray[np.float32]
Row = dict[str, Any]
PORTION = 512  # films of a reference set in one file
NEIGHBOURS = 5  # k of precision, recall, density and coverage


@dataclass(frozen=True)
class RunFeatures:
    """Features [n, d] of sources and counterfactuals, row by row those of ``labels``; n is the number of ok records."""

    source: Features
    counterfactual: Features
    labels: list[str]


@dataclass(frozen=True)
class Portion:
    """Images whose features make one file, the unit of work of an ``Embed``: ``sets`` is array name -> images, each a
    store and a path in it. What cannot be read is left out where ``lenient``, and an error elsewhere."""

    store: str
    path: str
    size: int  # of the grid that images are taken to
    sets: dict[str, list[tuple[str, str]]]
    ids: list[str]
    lenient: bool = False

    def stored(self) -> dict[str, Any] | None:
        """The file's arrays, by the names of ``sets``; None where it is missing, damaged or of other images."""
        try:
            found = np.load(io.BytesIO(open_store(self.store).read(self.path)))
            return {name: found[name] for name in self.sets} if list(found["ids"]) == self.ids else None
        except (FileNotFoundError, KeyError, ValueError, zipfile.BadZipFile):
            return None

    def fill(self, extractor: Extractor) -> None:
        """Compute and write the file. Raises BadImage or OSError for an unreadable image unless ``lenient``."""
        stores = {uri: open_store(uri) for images in self.sets.values() for uri, _ in images}
        arrays: dict[str, Any] = {"ids": np.array(self.ids)}
        for name, images in self.sets.items():
            arrays[name] = embed(
                extractor, [partial(stores[uri].read, path) for uri, path in images], self.size, self.lenient
            )
        open_store(self.store).put(self.path, npz(arrays))


Embed = Callable[["Extractor", Sequence[Portion]], None]  # fills portions, here or on a cluster


def embed_here(extractor: Extractor, portions: Sequence[Portion]) -> None:
    for portion in portions:
        portion.fill(extractor)


def run_features(
    run: Run, data: Store, rows: Sequence[Row], extractor: Extractor, spread: Embed = embed_here
) -> RunFeatures:
    """Features of a run's ``ok`` records, in the order of ``rows``: those the shards stored (the stand-in's), those of
    an earlier reduce, and computed (and kept) where missing."""
    shape = len(rows), extractor.dimension
    found = RunFeatures(np.zeros(shape, np.float32), np.zeros(shape, np.float32), [row["label"] for row in rows])
    place = {row["record_id"]: n for n, row in enumerate(rows)}
    portions = []
    for (folder, name), members in by_shard(rows).items():
        sets = {
            f"{extractor.name}/source": [(data.uri, row["source_path"]) for row in members],
            f"{extractor.name}/counterfactual": [(run.store.uri, row["counterfactual_path"]) for row in members],
        }
        ids = [row["record_id"] for row in members]
        own = f"{folder}features/{name}.npz"
        kept = f"{folder}features/{cache_key(extractor)}/{name}.npz"
        portion = Portion(run.store.uri, kept, run.recipe.model.resolution, sets, ids)
        by_worker = replace(portion, path=own)
        use_own = extractor.is_stand_in and by_worker.stored() is not None
        portions.append(by_worker if use_own else portion)
    for portion, arrays in zip(portions, filled(portions, extractor, spread), strict=True):
        at = [place[record] for record in portion.ids]
        found.source[at], found.counterfactual[at] = (arrays[name] for name in portion.sets)
    return found


def filled(portions: Sequence[Portion], extractor: Extractor, spread: Embed) -> Iterable[dict[str, Any]]:
    """The arrays of every portion, one after the other; those that are missing are computed first."""
    missing = [portion for portion in portions if portion.stored() is None]
    if missing:
        spread(extractor, missing)
    for portion in portions:
        arrays = portion.stored()
        if arrays is None:
            raise OSError(f"{portion.store}/{portion.path}: written a moment ago, and gone or damaged")
        yield arrays


def npz(arrays: dict[str, Any]) -> bytes:
    """Named arrays as an .npz file."""
    sink = io.BytesIO()
    np.savez(sink, **arrays)
    return sink.getvalue()


def cache_key(extractor: Extractor) -> str:
    """Folder name of an extractor's features: they are only as good as its weights and resize path."""
    return f"{extractor.name}-{extractor.resize}-{extractor.weights_sha256[:8]}"


def embed(extractor: Extractor, readers: Iterable[Callable[[], bytes]], size: int, lenient: bool = False) -> Features:
    """Features [n, d] of image files. ``legacy`` takes each file at its stored size, everything else on the model's
    square grid. Raises BadImage or OSError for an unreadable one; ``lenient`` leaves it out."""
    found: list[Features] = []
    waiting: list[NDArray[np.float32]] = []

    def flush() -> None:
        if waiting:
            found.append(extractor(np.stack(waiting)))
            waiting.clear()

    for read in readers:
        try:
            image = decode(read())
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


def reference_features(
    cache: Store, size: int, store: Store, films: Sequence[Film], extractor: Extractor, spread: Embed = embed_here
) -> tuple[Features, int]:
    """Features of a reference set on the model's ``size``, kept in ``cache`` (a run, or what several runs share) and
    found again by place and sizes of the films; and how many films were unreadable."""
    portions = []
    for start in range(0, len(films), PORTION):
        members = films[start : start + PORTION]
        name = digest([store.uri, size, [(film.path, film.size) for film in members]])[:16]
        path = f"features/{cache_key(extractor)}/reference-{name}.npz"
        images = {"features": [(store.uri, film.path) for film in members]}
        ids = [film.path for film in members]
        portions.append(Portion(cache.uri, path, size, images, ids, lenient=True))
    rows = [arrays["features"] for arrays in filled(portions, extractor, spread)]
    features = np.concatenate(rows) if rows else np.zeros((0, extractor.dimension), np.float32)
    return features, len(films) - len(features)


def distance_row(
    first: str, second: str, x: Features, y: Features, extractor: Extractor, groups: int, paired: bool = False
) -> Row | None:
    """One row of the distance table; None when a set has fewer than four films.

    ``paired``: row i of both sets is one film and its counterfactual; then ``halves`` says what the distance is when no
    film meets its own edit. ``manifold`` and ``infinity`` are absent where the sets are too small for them.
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
