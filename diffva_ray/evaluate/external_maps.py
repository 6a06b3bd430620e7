"""Reads external attribution maps: matches each map with its image, and reads its values.

A map is a PNG, TIFF or NPY file named like its image, in a folder of any depth. The maps of a diffva run are named by
record id instead, and are matched through the run's records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffva_ray.data.boxes import ends
from diffva_ray.data.dataset import LabelledImage, UnusableData
from diffva_ray.data.images import IMAGE_EXTENSIONS, MAX_PIXELS, BadImage, decode, describe
from diffva_ray.evaluate.records import as_records, finished, read_records
from diffva_ray.generate.run import Run, find_run
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import Store

Encoding = Literal["auto", "signed16", "unsigned"]
EXTENSIONS = (".png", ".npy", ".tif", ".tiff")
MAPS = "attributions"  # a run's folder of maps


@dataclass(frozen=True)
class MapFile:
    """One map file."""

    path: str  # relative to the store of the maps
    key: str  # path without extension, matched with the image's path
    label: str | None = None  # of a run's record; None: every label of the image
    reconstruction: str = ""  # path of the autoencoder's reconstruction; maps of a run only
    image_sha256: str = ""  # of the image that the map was made from; maps of a run only


@dataclass(frozen=True)
class MapFolder:
    """The maps at an address."""

    store: Store
    maps: list[MapFile]
    run: Run | None = None  # the run that made the maps; None: external maps
    ignored: int = 0  # number of files that are not maps, by their extension


@dataclass(frozen=True)
class Matched:
    """The result of matching maps with images."""

    pairs: list[tuple[MapFile, LabelledImage]]  # one for each label of an image
    maps_without_image: list[str] = field(default_factory=list)  # paths
    images_without_map: list[str] = field(default_factory=list)  # paths
    by: Literal["path", "name"] = "path"  # what was compared: paths, or file names alone


def open_maps(uri: str) -> MapFolder:
    """List the maps below ``uri``: a folder or ``s3://`` prefix of map files, a run, or a run's ``attributions``.

    Raises UnusableData when there are none.
    """
    try:
        store = open_store(uri)
        run = find_run(store)
        above, _, name = store.uri.rstrip("/").rpartition("/")
        if run is None and name == MAPS and above:
            run = find_run(open_store(above))
    except ValueError as error:  # an unknown scheme or a damaged run.json
        raise UnusableData(str(error)) from None
    if run is not None:
        return _of_run(run, uri)
    entries = [entry.path for entry in store.list()]
    named = [path for path in entries if path.lower().endswith(EXTENSIONS) and "/." not in f"/{path}"]
    if not named:
        raise UnusableData(f"{uri}: no maps there; expected {', '.join(EXTENSIONS)} files named like the images")
    return MapFolder(store, [MapFile(path, stem(path)) for path in named], ignored=len(entries) - len(named))


def _of_run(run: Run, uri: str) -> MapFolder:
    rows = as_records(finished(read_records(run)))
    if not rows:
        raise UnusableData(f"{uri}: that run has no finished record")
    maps = [
        MapFile(
            row["attribution_path"], stem(row["image_path"]), row["label"], _text(row["reconstruction_path"]),
            _text(row["image_sha256"]),
        )
        for row in rows
    ]  # fmt: skip
    return MapFolder(run.store, maps, run)


def _text(value: object) -> str:
    """A column's string; empty where pandas has NaN."""
    return value if isinstance(value, str) else ""


def stem(path: str) -> str:
    """``path`` without the extension of an image or array file: ``a/b.c.png`` -> ``a/b.c``."""
    head, dot, ending = path.rpartition(".")
    return head if dot and f".{ending.lower()}" in (*EXTENSIONS, *IMAGE_EXTENSIONS) else path


def match(maps: Sequence[MapFile], images: Sequence[LabelledImage], uri: str, records: bool = False) -> Matched:
    """Match maps with images: the path of one, without extension, ends with the path of the other.

    If no path fits, file names alone are compared. ``records``: the maps are of a run, which may have several of one
    image. Raises UnusableData, one line, for a map that fits two images and, without ``records``, for two maps of one
    image.
    """
    # image keys that fit each map
    by_key: dict[str, list[LabelledImage]] = {}
    for image in images:
        by_key.setdefault(stem(image.path), []).append(image)
    fits = _by_path({file.key for file in maps}, by_key)
    by: Literal["path", "name"] = "path"
    if not fits:
        fits, by = _by_name({file.key for file in maps}, by_key), "name"
    # pairs
    pairs, unmatched, map_of = [], [], dict[str, MapFile]()
    for file in maps:
        keys = fits.get(file.key, [])
        fitting = [image for key in keys for image in by_key[key] if file.label in (None, image.label)]
        paths = list(dict.fromkeys(image.path for image in fitting))
        if len(paths) > 1:
            raise UnusableData(
                f"{uri}: {file.path} fits {len(paths)} images, {paths[0]} and {paths[1]}; "
                "name maps by more of the image's path"
            )
        if not paths:
            unmatched.append(file.key if records else file.path)
            continue
        other = map_of.setdefault(paths[0], file)
        if other is not file and not records:
            raise UnusableData(f"{uri}: {other.path} and {file.path} are both maps of {paths[0]}; keep one of them")
        pairs += [(file, image) for image in fitting]
    without_map = list(dict.fromkeys(image.path for image in images if image.path not in map_of))
    return Matched(pairs, unmatched, without_map, by)


def _by_path(map_keys: set[str], images: dict[str, list[LabelledImage]]) -> dict[str, list[str]]:
    """Image keys by map key: those that end with the map's key; else the longest one that the map's key ends with."""
    fits: dict[str, list[str]] = {}
    for key in images:
        for end in ends(key):
            if end in map_keys:
                fits.setdefault(end, []).append(key)
    for key in map_keys - fits.keys():
        longest = next((end for end in ends(key) if end in images), None)
        if longest is not None:
            fits[key] = [longest]
    return fits


def _by_name(map_keys: set[str], images: dict[str, list[LabelledImage]]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for key in images:
        names.setdefault(key.rpartition("/")[2], []).append(key)
    return {key: names[name] for key in map_keys if (name := key.rpartition("/")[2]) in names}


def read_map_values(data: bytes, path: str, signed16: bool = False) -> NDArray[np.float32]:
    """Read the values of a map file as finite float32 [H, W].

    8- and 16-bit PNG and TIFF are scaled to [0, 1]; with ``signed16``, 16-bit levels are read as this project writes
    them, in [-1, 1] with 32768 as zero. Float and 32-bit TIFF and NPY arrays keep their values, except that uint8 and
    uint16 arrays are scaled to [0, 1]; axes of length 1 are dropped. Raises BadImage for a coloured image (a rendered
    heat map has lost its values), for another shape, and for values that are not finite.
    """
    values = _read_npy(data) if path.lower().endswith(".npy") else _read_image(data, signed16)
    values = np.squeeze(values)
    if values.ndim != 2 or not values.size:
        raise BadImage(f"a map is [H, W]; this array is {list(values.shape)}")
    with np.errstate(over="ignore"):
        floats: NDArray[np.float32] = values.astype(np.float32)
    if not np.isfinite(floats).all():
        raise BadImage("the map has values that are not finite")
    return floats


def is_sixteen_bit(data: bytes, path: str) -> bool:
    """Whether a file is a 16-bit grey image, whose levels may mean [0, 1] or this project's [-1, 1]."""
    return not path.lower().endswith(".npy") and describe(data).endswith("grey 16-bit")


def _read_npy(data: bytes) -> NDArray[np.generic]:
    try:
        array = np.load(BytesIO(data), allow_pickle=False)
    except Exception as error:
        raise BadImage(f"not an NPY array ({error})") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
        kind = getattr(array, "dtype", "an archive")
        raise BadImage(f"a map is an NPY array of numbers; this is {kind}")
    if array.dtype in (np.uint8, np.uint16):
        return array / np.float64(np.iinfo(array.dtype).max)
    return array


def _read_image(data: bytes, signed16: bool) -> NDArray[np.generic]:
    description = describe(data)
    # grey images
    if description.endswith("grey 16-bit") and signed16:
        levels: NDArray[np.float32] = (np.rint(decode(data) * np.float32(65535)) - 32768) / np.float32(32767)
        return np.clip(levels, -1, 1)
    if " grey " in description and not description.endswith(("grey float", "grey 32-bit")):
        return decode(data)
    # float and 32-bit images keep their values; colour images must be grey
    try:
        image = Image.open(BytesIO(data), formats=("PNG", "TIFF"))
        if image.width * image.height > MAX_PIXELS:
            raise BadImage(f"{image.width} x {image.height} is more than {MAX_PIXELS:,} pixels")
        if image.mode in ("I", "F"):  # decode would scale the values to [0, 1]
            return np.asarray(image, np.float64)
        if image.mode == "1":
            return decode(data)
        red, green, blue = (np.asarray(channel) for channel in image.convert("RGB").split())
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(f"damaged or truncated image ({type(error).__name__}: {error})") from None
    if not (np.array_equal(red, green) and np.array_equal(green, blue)):
        raise BadImage("a coloured image: save the map's values, not their rendering")
    return red / np.float32(255)


def first_paths(paths: Sequence[str]) -> str:
    """The first two paths, for a note."""
    return ", ".join(paths[:2]) + (" ..." if len(paths) > 2 else "")
