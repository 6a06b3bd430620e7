"""Detects the layout of a data set and reads it.

To add a layout, add a module to this folder with ``LAYOUT`` (its description, for messages) and ``read``, and its name
to KINDS.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from itertools import groupby

from diffva_ray.config.recipe import DataConfig
from diffva_ray.data import boxes, chexpert, manifest
from diffva_ray.data.dataset import Dataset, LabelledImage, UnusableData, companions
from diffva_ray.data.radiography import COMPANIONS
from diffva_ray.progress import one_line
from diffva_ray.provenance import missing
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import Store

KINDS = [
    import_module(f"diffva_ray.data.{name}")
    for name in ("chexpert", "radiography", "folder")  # the first one that recognises the layout reads the folder
]
LAYOUTS = f"{', '.join(kind.LAYOUT for kind in KINDS)}, or {manifest.LAYOUT}"
DEFAULTS = DataConfig()


def open_dataset(
    uri: str | os.PathLike[str], config: DataConfig = DEFAULTS, classes: Sequence[str] | None = None
) -> Dataset:
    """Opens a data set of any supported layout. The store is listed once; no image is read.

    Lung masks, lesion masks and ground-truth counterfactuals beside the images (``masks/``, ``lesions/``,
    ``ground_truth/``, same file name) and a ``boxes.csv`` are found for every layout.

    Args:
        uri: A folder or a manifest file, local or ``s3://``.
        config: Options of the data set (the recipe's ``data``).
        classes: Keep only the images of these classes; None keeps all.

    Returns:
        The images in a fixed order; see ``Dataset``.

    Raises:
        UnusableData: Nothing there, an unknown layout, an invalid table, or an unknown class; the message is one line.
    """
    # open and list the store
    place, file = _split(os.fspath(uri))
    try:
        store = open_store(place)
    except ValueError as error:
        raise UnusableData(str(error)) from None
    try:
        listed = store.list()
        entries = [entry for entry in listed if _is_text(entry.path)]
        existing = {entry.path for entry in entries}
        if file and file not in existing:
            raise UnusableData(f"{uri}: no such file")
        if not entries:
            raise UnusableData(f"{uri}: no files there; expected {LAYOUTS}")
        # read the layout
        if file:
            dataset = manifest.read(store, entries, config, file) or chexpert.read(store, entries, config, [file])
        else:
            dataset = next((result for kind in KINDS if (result := kind.read(store, entries, config))), None)
        if any("/twins/" in f"/{entry.path}" for entry in entries):
            raise UnusableData(
                f"{uri}: has folders twins/ (a phantom set of an earlier version); rename them to ground_truth/"
            )
        if dataset is None:
            raise UnusableData(f"{uri}: {_columns(store, file) if file else f'no images; expected {LAYOUTS}'}")
        if not dataset.images:
            raise UnusableData(f"{uri}: names no images")
        if find_spec("pydicom") is None and any(image.path.lower().endswith(".dcm") for image in dataset.images):
            raise UnusableData(f"{uri}: {missing('pydicom', 'DICOM files', 'dicom')}")
        # add masks and boxes, and filter
        if len(entries) < len(listed):
            dataset.notes.append(f"{len(listed) - len(entries)} files are ignored: their names are not UTF-8")
        return _filtered(replace(_completed(dataset, existing), bits=config.bits), classes, str(uri))
    except OSError as error:
        raise UnusableData(f"{uri}: cannot be read ({one_line(error)})") from None


def _split(uri: str) -> tuple[str, str]:
    """The folder and, for a manifest, the name of the file in it."""
    if not uri.lower().endswith(manifest.EXTENSIONS):
        return uri, ""
    place, slash, name = uri.rpartition("/")
    return place or slash or ".", name


def _is_text(path: str) -> bool:
    """False for file names that are not valid UTF-8: neither Parquet nor JSON can store them."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _columns(store: Store, file: str) -> str:
    """Error text that compares the columns of a table with those of a manifest."""
    columns = manifest.read_table(store.read(file), file).columns
    return f"needs the columns path,label[,mask][,caption]; it has {','.join(columns)}"


def _completed(dataset: Dataset, existing: set[str]) -> Dataset:
    """The data set sorted, without duplicates, with masks, ground-truth counterfactuals and boxes."""
    notes = list(dataset.notes)
    images = []
    beside = {path for path in existing if path.split("/")[-2:-1] and path.split("/")[-2] in COMPANIONS}
    ordered = sorted(dataset.images, key=lambda image: (image.path, image.label, image.lung_mask == ""))
    for _, same in groupby(ordered, key=lambda image: (image.path, image.label)):
        image = next(same)
        images.append(_with_companions(image, beside) if beside else image)
    if len(images) < len(ordered):
        notes.append(f"{len(ordered) - len(images)} repeated rows of the same image and label are merged")
    csv_boxes, box_notes = _boxes(dataset.store, [image.path for image in images], existing)
    return replace(dataset, images=images, notes=notes + box_notes, boxes=dataset.boxes or csv_boxes)


def _with_companions(image: LabelledImage, beside: set[str]) -> LabelledImage:
    def find(kind: str) -> str:
        return next((path for path in companions(image.path, kind) if path in beside), "")

    return replace(
        image,
        lung_mask=image.lung_mask or find("masks"),
        lesion_mask=image.lesion_mask or find("lesions"),
        ground_truth=image.ground_truth or find("ground_truth"),
    )


def _boxes(store: Store, paths: Sequence[str], existing: set[str]) -> tuple[dict[str, list[boxes.Box]], list[str]]:
    """Boxes and a note, from ``boxes.csv`` at the root or in the only folder that contains images."""
    tops = {path.split("/")[0] for path in paths}
    for name in ("boxes.csv", *(f"{top}/boxes.csv" for top in tops if len(tops) == 1)):
        if name in existing:
            rows = boxes.parse(store.read(name), name)
            by_image = boxes.match(rows, paths)
            count = sum(map(len, by_image.values()))
            unmatched = f"; {len(rows) - count} match no image" if count < len(rows) else ""
            return by_image, [f"{count} boxes on {len(by_image)} images ({name}){unmatched}"]
    return {}, []


def _filtered(dataset: Dataset, classes: Sequence[str] | None, uri: str) -> Dataset:
    if not classes:
        return dataset
    existing = dataset.classes
    for name in classes:
        if name not in existing:
            raise UnusableData(f"{uri}: no class {name!r}; there are {', '.join(existing)}")
    images = [image for image in dataset.images if image.label in classes]
    paths = {image.path for image in images}
    return replace(dataset, images=images, boxes={path: b for path, b in dataset.boxes.items() if path in paths})
