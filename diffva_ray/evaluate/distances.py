"""Distances between sets of films: features where they are missing, then FID (or a stand-in's distance) and KID."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
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
from diffva_ray.storage import Store

if TYPE_CHECKING:  # it loads torch, which a driver that only plans has no use for
    from diffva_ray.metrics.features import Extractor

Features = NDArray[np.float32]
Row = dict[str, Any]
NEIGHBOURS = 5  # k of precision, recall, density and coverage


@dataclass(frozen=True)
class RunFeatures:
    """Features [n, d] of sources and counterfactuals, row by row those of ``labels``; n is the number of ok records."""

    source: Features
    counterfactual: Features
    labels: list[str]


def run_features(run: Run, data: Store, rows: Sequence[Row], extractor: Extractor) -> RunFeatures:
    """Features of a run's ``ok`` records, in the order of ``rows``: those the shards stored, computed (and kept) where
    missing."""
    size = len(rows), extractor.dimension
    found = RunFeatures(np.zeros(size, np.float32), np.zeros(size, np.float32), [row["label"] for row in rows])
    place = {row["record_id"]: n for n, row in enumerate(rows)}
    for shard, members in by_shard(rows).items():
        at = [place[row["record_id"]] for row in members]
        found.source[at], found.counterfactual[at] = _shard_features(run, data, shard, members, extractor)
    return found


def _shard_features(
    run: Run, data: Store, shard: tuple[str, str], rows: list[Row], extractor: Extractor
) -> tuple[Features, Features]:
    """What the shard's worker stored (the stand-in's), or an earlier reduce (any extractor's), or computed now."""
    folder, name = shard
    cached = f"{folder}features/{cache_key(extractor)}/{name}.npz"
    path = f"{folder}features/{name}.npz" if extractor.is_stand_in else cached
    try:
        stored = np.load(io.BytesIO(run.store.read(path)))
        if list(stored["ids"]) == [row["record_id"] for row in rows]:
            return stored[f"{extractor.name}/source"], stored[f"{extractor.name}/counterfactual"]
    except (FileNotFoundError, KeyError, ValueError, zipfile.BadZipFile):
        pass
    size = run.recipe.model.resolution
    before = embed(extractor, [partial(data.read, row["source_path"]) for row in rows], size)
    after = embed(extractor, [partial(run.store.read, row["counterfactual_path"]) for row in rows], size)
    ids = np.array([row["record_id"] for row in rows])
    arrays = {"ids": ids, f"{extractor.name}/source": before, f"{extractor.name}/counterfactual": after}
    run.store.put(cached, npz(arrays))
    return before, after


def npz(arrays: dict[str, Any]) -> bytes:
    """Named arrays as an .npz file."""
    sink = io.BytesIO()
    np.savez(sink, **arrays)
    return sink.getvalue()


def cache_key(extractor: Extractor) -> str:
    """Folder name of an extractor's features: they are only as good as its weights and resize path."""
    return f"{extractor.name}-{extractor.resize}-{extractor.weights_sha256[:8]}"


def embed(extractor: Extractor, readers: Iterable[Callable[[], bytes]], size: int) -> Features:
    """Features [n, d] of image files. ``legacy`` takes each file at its stored size, everything else on the model's
    square grid. Raises BadImage for an unreadable one."""
    found: list[Features] = []
    waiting: list[NDArray[np.float32]] = []

    def flush() -> None:
        if waiting:
            found.append(extractor(np.stack(waiting)))
            waiting.clear()

    for read in readers:
        image = decode(read())
        if extractor.resize != "legacy":
            image = to_square(image, size)
        if (waiting and waiting[0].shape != image.shape) or len(waiting) == extractor.micro_batch:
            flush()
        waiting.append(image)
    flush()
    return np.concatenate(found) if found else np.zeros((0, extractor.dimension), np.float32)


def reference_features(
    cache: Store, size: int, store: Store, films: Sequence[Film], extractor: Extractor, label: str
) -> tuple[Features, int]:
    """Features of a reference class on the model's ``size``, kept in ``cache`` (a run, or what several runs share) and
    found again by place and sizes of the films; and how many films were unreadable."""
    name = digest([store.uri, size, sorted((film.path, film.size) for film in films)])[:16]
    path = f"features/{cache_key(extractor)}/reference-{name}.npz"
    try:
        stored = np.load(io.BytesIO(cache.read(path)))
        return stored["features"], int(stored["unreadable"])
    except (FileNotFoundError, KeyError, ValueError, zipfile.BadZipFile):
        pass
    rows = []
    for film in films:
        try:
            rows.append(embed(extractor, [partial(store.read, film.path)], size))
        except (BadImage, OSError):
            continue
    features = np.concatenate(rows) if rows else np.zeros((0, extractor.dimension), np.float32)
    cache.put(path, npz({"features": features, "unreadable": len(films) - len(rows), "label": label}))
    return features, len(films) - len(rows)


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
