"""The one place that finds out what kind of data set a folder or file is.

A new kind is a module of this folder with ``LAYOUT`` (what to recognise it by, for messages) and ``read``, and a line
in KINDS.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from itertools import groupby

from diffva_ray.config.recipe import DataConfig
from diffva_ray.data import boxes, chexpert, manifest
from diffva_ray.data.dataset import Dataset, LabelledImage, UnusableData, companions
from diffva_ray.data.radiography import COMPANIONS
from diffva_ray.progress import one_line
from diffva_ray.storage.store import Store, open_store

KINDS = [
    import_module(f"diffva_ray.data.{name}")
    for name in (  # the first that knows a folder's layout reads it
        "chexpert",
        "radiography",
        "folder",
    )
]
LAYOUTS = f"{', '.join(kind.LAYOUT for kind in KINDS)}, or {manifest.LAYOUT}"
DEFAULTS = DataConfig()


def open_dataset(
    uri: str | os.PathLike[str], config: DataConfig = DEFAULTS, classes: Sequence[str] | None = None
) -> Dataset:
    """The images at ``uri`` (a folder or a manifest file, local or ``s3://``), of ``classes`` only where given.

    The store is listed once. Masks, lesions and ground truth lying beside the images (``masks/``, ``lesions/``,
    ``ground_truth/``, same name) and a ``boxes.csv`` are found for every kind. Raises UnusableData, one line that says
    what is wrong.
    """
    place, file = _split(os.fspath(uri))
    try:
        store = open_store(place)
    except ValueError as error:
        raise UnusableData(str(error)) from None
    try:
        listed = store.list()
        entries = [entry for entry in listed if _is_text(entry.path)]
        known = {entry.path for entry in entries}
        if file and file not in known:
            raise UnusableData(f"{uri}: no such file")
        if not entries:
            raise UnusableData(f"{uri}: no files there; expected {LAYOUTS}")
        if file:
            dataset = manifest.read(store, entries, config, file) or chexpert.read(store, entries, config, [file])
        else:
            dataset = next((found for kind in KINDS if (found := kind.read(store, entries, config))), None)
        if any("/twins/" in f"/{entry.path}" for entry in entries):
            raise UnusableData(
                f"{uri}: holds twins/, as phantom sets of an earlier version do; rename those folders to ground_truth/"
            )
        if dataset is None:
            raise UnusableData(f"{uri}: {_columns(store, file) if file else f'no images; expected {LAYOUTS}'}")
        if not dataset.images:
            raise UnusableData(f"{uri}: names no images")
        if len(entries) < len(listed):
            dataset.notes.append(f"{len(listed) - len(entries)} files are ignored: their names are not UTF-8")
        return _filtered(replace(_completed(dataset, known), bits=config.bits), classes, str(uri))
    except OSError as error:
        raise UnusableData(f"{uri}: cannot be read ({one_line(error)})") from None


def _split(uri: str) -> tuple[str, str]:
    """Folder and, for a manifest, its name in it."""
    if not uri.lower().endswith(manifest.EXTENSIONS):
        return uri, ""
    place, slash, name = uri.rpartition("/")
    return place or slash or ".", name


def _is_text(path: str) -> bool:
    """False for names of stray bytes, which neither Parquet nor JSON can hold."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _columns(store: Store, file: str) -> str:
    columns = manifest.read_table(store.read(file), file).columns
    return f"needs the columns path,label[,mask][,caption]; it has {','.join(columns)}"


def _completed(dataset: Dataset, known: set[str]) -> Dataset:
    """The data set in order, without repeated images, with the files beside them."""
    notes = list(dataset.notes)
    images = []
    beside = {path for path in known if path.split("/")[-2:-1] and path.split("/")[-2] in COMPANIONS}
    ordered = sorted(dataset.images, key=lambda image: (image.path, image.label, image.lung_mask == ""))
    for _, same in groupby(ordered, key=lambda image: (image.path, image.label)):
        image = next(same)
        images.append(_with_companions(image, beside) if beside else image)
    if len(images) < len(ordered):
        notes.append(f"{len(ordered) - len(images)} repeated rows of the same image and label are merged")
    found, said = _boxes(dataset.store, [image.path for image in images], known)
    return replace(dataset, images=images, notes=notes + said, boxes=dataset.boxes or found)


def _with_companions(image: LabelledImage, beside: set[str]) -> LabelledImage:
    def find(kind: str) -> str:
        return next((path for path in companions(image.path, kind) if path in beside), "")

    return replace(
        image,
        lung_mask=image.lung_mask or find("masks"),
        lesion_mask=image.lesion_mask or find("lesions"),
        ground_truth=image.ground_truth or find("ground_truth"),
    )


def _boxes(store: Store, paths: Sequence[str], known: set[str]) -> tuple[dict[str, list[boxes.Box]], list[str]]:
    """The boxes in ``boxes.csv`` at the root, or in the one folder that holds all images."""
    tops = {path.split("/")[0] for path in paths}
    for name in ("boxes.csv", *(f"{top}/boxes.csv" for top in tops if len(tops) == 1)):
        if name in known:
            rows = boxes.parse(store.read(name), name)
            found = boxes.match(rows, paths)
            count = sum(map(len, found.values()))
            strays = f"; {len(rows) - count} fit no image" if count < len(rows) else ""
            return found, [f"{count} boxes on {len(found)} images ({name}){strays}"]
    return {}, []


def _filtered(dataset: Dataset, classes: Sequence[str] | None, uri: str) -> Dataset:
    if not classes:
        return dataset
    there = dataset.classes
    for name in classes:
        if name not in there:
            raise UnusableData(f"{uri}: no class {name!r}; there are {', '.join(there)}")
    wanted = set(classes)
    images = [image for image in dataset.images if image.label in wanted]
    paths = {image.path for image in images}
    return replace(dataset, images=images, boxes={path: b for path, b in dataset.boxes.items() if path in paths})
