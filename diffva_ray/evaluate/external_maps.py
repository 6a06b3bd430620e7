"""Attribution maps from anywhere: which image each belongs to, and its values.

A map is a PNG, TIFF or NPY file named like its image, in a folder of any depth. The maps of one of our runs are named
by record instead; they are matched through its records.
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
from diffva_ray.evaluate.records import read_records
from diffva_ray.generate.run import Run, find_run
from diffva_ray.schema import Status
from diffva_ray.storage.store import Store, open_store

Encoding = Literal["auto", "signed16", "unsigned"]
EXTENSIONS = (".png", ".npy", ".tif", ".tiff")
MAPS = "attributions"  # a run's own folder of maps


@dataclass(frozen=True)
class MapFile:
    """One map. ``key`` is what is matched with images: a path without its extension."""

    path: str  # relative to the store of the maps
    key: str
    label: str | None = None  # of a run's record; None: every label of its image
    reconstruction: str = ""  # the autoencoder's rendering of the image; this and the next only a run has
    image_sha256: str = ""


@dataclass(frozen=True)
class MapFolder:
    """The maps at an address. ``run`` is the run they are of, or None for maps made elsewhere."""

    store: Store
    maps: list[MapFile]
    run: Run | None = None
    ignored: int = 0  # files that are no maps, by their names


@dataclass(frozen=True)
class Matched:
    """Maps with their images (one pair for each label of an image), and what is left on either side."""

    pairs: list[tuple[MapFile, LabelledImage]]
    maps_without_image: list[str] = field(default_factory=list)
    images_without_map: list[str] = field(default_factory=list)
    by: Literal["path", "name"] = "path"


def open_maps(uri: str) -> MapFolder:
    """The maps below ``uri``: a folder or ``s3://`` prefix of map files, a run, or a run's ``maps``.

    Raises UnusableData when there are none.
    """
    try:
        store = open_store(uri)
        run = find_run(store)
        above, _, name = store.uri.rstrip("/").rpartition("/")
        if run is None and name == MAPS and above:
            run = find_run(open_store(above))
    except ValueError as error:  # an unknown scheme, or a run.json that is damaged
        raise UnusableData(str(error)) from None
    if run is not None:
        return _of_run(run, uri)
    entries = [entry.path for entry in store.list()]
    named = [path for path in entries if path.lower().endswith(EXTENSIONS) and "/." not in f"/{path}"]
    if not named:
        raise UnusableData(f"{uri}: no maps there; expected {', '.join(EXTENSIONS)} files named like the images")
    return MapFolder(store, [MapFile(path, stem(path)) for path in named], ignored=len(entries) - len(named))


def _of_run(run: Run, uri: str) -> MapFolder:
    records = read_records(run)
    rows = records[records["status"] == Status.OK.value].to_dict("records")
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
    """A column's text; pandas has NaN where there is none."""
    return value if isinstance(value, str) else ""


def stem(path: str) -> str:
    """``path`` without the extension of a picture or an array: ``a/b.c.png`` -> ``a/b.c``."""
    head, dot, ending = path.rpartition(".")
    return head if dot and f".{ending.lower()}" in (*EXTENSIONS, *IMAGE_EXTENSIONS) else path


def match(maps: Sequence[MapFile], images: Sequence[LabelledImage], uri: str, records: bool = False) -> Matched:
    """Which map is of which image: the path of one (without extension) ends with the path of the other.

    Where that fits no map at all, the file name alone decides. Raises UnusableData, one line, for a map that fits two
    images and, unless ``records`` (a run may have several of one image), for two maps of one image.
    """
    by_key: dict[str, list[LabelledImage]] = {}
    for image in images:
        by_key.setdefault(stem(image.path), []).append(image)
    fits = _by_path({file.key for file in maps}, by_key)
    by: Literal["path", "name"] = "path"
    if not fits:
        fits, by = _by_name({file.key for file in maps}, by_key), "name"
    pairs, orphans, taken = [], [], dict[str, MapFile]()
    for file in maps:
        keys = fits.get(file.key, [])
        found = [image for key in keys for image in by_key[key] if file.label in (None, image.label)]
        paths = list(dict.fromkeys(image.path for image in found))
        if len(paths) > 1:
            raise UnusableData(
                f"{uri}: {file.path} fits {len(paths)} images, {paths[0]} and {paths[1]}; "
                "name maps by more of the image's path"
            )
        if not paths:
            orphans.append(file.key if records else file.path)
            continue
        other = taken.setdefault(paths[0], file)
        if other is not file and not records:
            raise UnusableData(f"{uri}: {other.path} and {file.path} are both maps of {paths[0]}; keep one of them")
        pairs += [(file, image) for image in found]
    left = list(dict.fromkeys(image.path for image in images if image.path not in taken))
    return Matched(pairs, orphans, left, by)


def _by_path(wanted: set[str], known: dict[str, list[LabelledImage]]) -> dict[str, list[str]]:
    """LabelledImage keys that end with a map's key; else the longest image key that the map's key ends with."""
    fits: dict[str, list[str]] = {}
    for key in known:
        for end in ends(key):
            if end in wanted:
                fits.setdefault(end, []).append(key)
    for key in wanted - fits.keys():
        longest = next((end for end in ends(key) if end in known), None)
        if longest is not None:
            fits[key] = [longest]
    return fits


def _by_name(wanted: set[str], known: dict[str, list[LabelledImage]]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for key in known:
        names.setdefault(key.rpartition("/")[2], []).append(key)
    return {key: names[name] for key in wanted if (name := key.rpartition("/")[2]) in names}


def read_map_values(data: bytes, path: str, signed16: bool = False) -> NDArray[np.float32]:
    """The values of a map file as float32 [H, W]; finite, in whatever range they were stored.

    8- and 16-bit PNG and TIFF become [0, 1]; with ``signed16`` 16-bit levels are read as this project writes them, in
    [-1, 1] with 32768 as zero. Float and 32-bit TIFF and NPY arrays are taken as they are, except that NPY arrays of
    unsigned bytes or words become [0, 1] too; axes of length 1 are dropped. Raises BadImage for what has colours (a
    rendered heat map has lost its values), for another shape, and for values that are not finite.
    """
    values = _array(data) if path.lower().endswith(".npy") else _picture(data, signed16)
    values = np.squeeze(values)
    if values.ndim != 2 or not values.size:
        raise BadImage(f"a map is [H, W]; this array is {list(values.shape)}")
    with np.errstate(over="ignore"):
        floats: NDArray[np.float32] = values.astype(np.float32)
    if not np.isfinite(floats).all():
        raise BadImage("the map has values that are not finite")
    return floats


def is_sixteen_bit(data: bytes, path: str) -> bool:
    """Whether a file is a 16-bit grey picture, whose levels may mean [0, 1] or this project's [-1, 1]."""
    return not path.lower().endswith(".npy") and describe(data).endswith("grey 16-bit")


def _array(data: bytes) -> NDArray[np.generic]:
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


def _picture(data: bytes, signed16: bool) -> NDArray[np.generic]:
    what = describe(data)
    if what.endswith("grey 16-bit") and signed16:
        return np.clip((np.rint(decode(data) * np.float32(65535)) - 32768) / np.float32(32767), -1, 1)
    if " grey " in what and not what.endswith(("grey float", "grey 32-bit")):
        return decode(data)
    try:
        image = Image.open(BytesIO(data), formats=("PNG", "TIFF"))
        if image.width * image.height > MAX_PIXELS:
            raise BadImage(f"{image.width} x {image.height} is more than {MAX_PIXELS:,} pixels")
        if image.mode in ("I", "F"):  # decode would bring an image's values into [0, 1]; a map's are its own
            return np.asarray(image, np.float64)
        if image.mode == "1":
            return decode(data)
        red, green, blue = (np.asarray(channel) for channel in image.convert("RGB").split())
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(f"damaged or truncated image ({type(error).__name__}: {error})") from None
    if not (np.array_equal(red, green) and np.array_equal(green, blue)):
        raise BadImage("a picture in colours: save the map's values, not their rendering")
    return red / np.float32(255)


def on_grid(values: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """A map [H, W] squashed or enlarged to [size, size]: bilinear (antialiased where it shrinks), which keeps zero,
    sign and range; the map itself if it fits."""
    if values.shape == (size, size):
        return values
    return np.asarray(Image.fromarray(values).resize((size, size), Image.Resampling.BILINEAR), np.float32)


def first_paths(paths: Sequence[str]) -> str:
    """A few names, for a note."""
    return ", ".join(paths[:2]) + (" ..." if len(paths) > 2 else "")
