"""Recognises a data set and reads it.

To add one, add a module to ``readers/`` with ``LAYOUT`` (its description, for messages) and ``read``, and its name to
READERS.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import groupby
from typing import Protocol

from diffva_ray.config.recipe import DataConfig
from diffva_ray.data import boxes, labels, manifest
from diffva_ray.data.dataset import Dataset, LabelledImage, UnusableData, companions, is_hidden
from diffva_ray.data.images import IMAGE_EXTENSIONS
from diffva_ray.data.listing import Listing
from diffva_ray.data.readers import (
    chestxdet,
    chexlocalize,
    chexpert,
    class_folders,
    embedded,
    image_folder,
    mimic,
    nih,
    padchest,
    radiography,
    rsna,
    siim,
    split_folders,
    vindr,
    webdataset,
)
from diffva_ray.data.shapes import Shape
from diffva_ray.data.tables import EXTENSIONS, read_table
from diffva_ray.progress import one_line
from diffva_ray.provenance import missing
from diffva_ray.storage import archives
from diffva_ray.storage.opening import open_file, open_store
from diffva_ray.storage.store import Entry, Store


class Reader(Protocol):
    """A module that reads one layout."""

    LAYOUT: str  # what the layout is recognised by, for messages

    def read(self, listing: Listing) -> Dataset | None:
        """The data set, or None for another layout. Raises UnusableData for an incomplete one."""


READERS: tuple[Reader, ...] = (  # the first one that recognises the layout reads the folder
    chexlocalize,
    chexpert,
    mimic,
    nih,
    rsna,
    siim,
    vindr,
    padchest,
    chestxdet,
    image_folder,
    embedded,
    webdataset,
    radiography,
    split_folders,
    class_folders,
)
LAYOUTS = f"{', '.join(reader.LAYOUT for reader in READERS)}, or {manifest.LAYOUT}"
DEFAULTS = DataConfig()
NO_CLASS = "(no class)"  # of a single image
DICOM = (".dcm", ".dicom")
ARCHIVES = {"tar": "no images in them", "parquet": "no column of images", "zip": "unpack them", "gz": "unpack them"}
PACKED = (archives.TAR, archives.PARQUET)
ANNOTATIONS = ("csv", "tsv", "json", "jsonl", "txt", "md", "xlsx", "html", "yaml", "yml", "pdf", "pkl", "parquet", "gz")


def open_dataset(
    uri: str | os.PathLike[str], config: DataConfig = DEFAULTS, classes: Sequence[str] | None = None
) -> Dataset:
    """Opens a data set of any supported layout. The store is listed once; no image is decoded.

    Lung masks, lesion masks and ground-truth counterfactuals beside the images (``masks/``, ``lesions/``,
    ``ground_truth/``, same file name) and a ``boxes.csv`` are found for every layout. Spellings and synonyms of a
    label become one class.

    Args:
        uri: A folder or a manifest file, local or ``s3://``.
        config: Options of the data set (the recipe's ``data``).
        classes: Keep only the images of these classes; None keeps all.

    Returns:
        The images in a fixed order; see ``Dataset``.

    Raises:
        UnusableData: Nothing there, an unknown layout, an invalid table, or an unknown class; the message is one line.
    """
    place, file = _split(os.fspath(uri))
    try:
        store = open_store(place)
        root = open_store(config.root) if file and config.root else store
    except ValueError as error:
        raise UnusableData(str(error)) from None
    try:
        # list the files
        listed = root.list()
        listing = Listing(root, [entry for entry in listed if _is_text(entry.path)], config)
        if file and not (file in listing.sizes if root is store else store.exists(file)):
            raise UnusableData(f"{uri}: no such file")
        if not listing.entries:
            given = uri if root is store else f"--root {config.root}"
            raise UnusableData(_nothing_there(given, place))
        if any("/twins/" in f"/{entry.path}" for entry in listing.entries):
            raise UnusableData(
                f"{uri}: has folders twins/ (a phantom set of an earlier version); rename them to ground_truth/"
            )
        # read the layout
        listing = _with_members(listing, file) if _is_packed(listing, file) else listing
        dataset = _read_file(store, listing, file) if file else _read_folder(listing)
        if not dataset.images:
            raise UnusableData(f"{uri}: names no images{_reasons(dataset)}")
        if find_spec("pydicom") is None and any(image.path.lower().endswith(DICOM) for image in dataset.images):
            raise UnusableData(f"{uri}: {missing('pydicom', 'DICOM files', 'dicom')}")
        # one name per class, masks and boxes, classes
        dataset = _completed(labels.unified(dataset, config), listing)
        if len(listing.entries) < len(listed):
            dataset.left_out.append(f"{len(listed) - len(listing.entries)} files whose names are not UTF-8")
        return _filtered(replace(dataset, bits=config.bits), classes, str(uri), config)
    except OSError as error:
        raise UnusableData(f"{uri}: cannot be read ({one_line(error)})") from None


def dataset_or_image(uri: str, config: DataConfig) -> Dataset:
    """The data set at ``uri``, or one of a single image without a class if it is an image file. Raises UnusableData."""
    if not _is_image(uri):
        return open_dataset(uri, config)
    try:
        store, name = open_file(uri)
        size = len(store.read(name))
    except IsADirectoryError:
        return open_dataset(uri, config)
    except (OSError, ValueError) as error:
        raise UnusableData(f"{uri}: cannot be read ({one_line(error)})") from None
    return Dataset(store, [LabelledImage(name, NO_CLASS, size)], "image", bits=config.bits, why="its extension")


def _split(uri: str) -> tuple[str, str]:
    """The folder and, for a manifest or an archive, the name of the file in it."""
    if not uri.lower().endswith((*EXTENSIONS, archives.TAR)):
        return uri, ""
    place, slash, name = uri.rpartition("/")
    return place or slash or ".", name


def _nothing_there(uri: str | os.PathLike[str], place: str) -> str:
    """The message about an address below which no files are listed; it may be that of a file."""
    if _is_image(place):
        return f"{uri}: no files there (a single image is no data set; give its folder); expected {LAYOUTS}"
    store, name = open_file(place)
    if name and store.exists(name):
        return f"{uri}: not read; save a table as one of {', '.join(EXTENSIONS)}, or give a folder"
    return f"{uri}: no files there; expected {LAYOUTS}"


def _is_image(place: str) -> bool:
    return place.lower().endswith(IMAGE_EXTENSIONS)


def _is_text(path: str) -> bool:
    """False for file names that are not valid UTF-8: neither Parquet nor JSON can store them."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_packed(listing: Listing, file: str) -> bool:
    """Whether the images are inside archives: there are no others, or one archive is named."""
    if not file:
        return not listing.images and any(entry.path.lower().endswith(PACKED) for entry in listing.entries)
    if not file.lower().endswith(PACKED) or file not in listing.sizes:
        return False
    return file.lower().endswith(archives.TAR) or not listing.images or not _is_manifest(listing, file)


def _is_manifest(listing: Listing, file: str) -> bool:
    table = listing.table(file)
    return {"image", "label"} <= set(manifest.columns_by_role(table, DEFAULTS, file))


def _with_members(listing: Listing, file: str) -> Listing:
    """The listing with the members of all archives, or with those of the archive ``file`` only."""
    store = archives.ArchiveStore(listing.store)
    if not file:
        return Listing(store, [entry for entry in store.list() if _is_text(entry.path)], listing.config)
    members = store.members(Entry(file, listing.sizes[file]))
    if not members:
        return listing
    return Listing(store, sorted([*listing.entries, *members]), listing.config)


def _read_file(store: Store, listing: Listing, file: str) -> Dataset:
    """The data set of a file: CheXpert's table, an archive or a manifest."""
    if isinstance(listing.store, archives.ArchiveStore):
        dataset = embedded.read(listing) or webdataset.read(listing)
        if dataset is not None:
            return dataset
    if file.lower().endswith(archives.TAR):
        raise UnusableData(f"{store.uri}/{file}: no images with labels; expected {webdataset.LAYOUT}, or unpack it")
    data = listing.source(file) if listing.store is store else store.read(file)
    dataset = chexpert.read(listing, [file]) if file in listing.sizes else None
    if dataset is None:
        dataset = manifest.read(listing, file, data)
    if dataset is None:
        columns = read_table(data, file).columns
        raise UnusableData(
            f"{store.uri}/{file}: needs the columns path,label[,mask][,caption][,patient]; it has {','.join(columns)}; "
            "name them with --columns image=NAME,label=NAME"
        )
    return dataset


def _read_folder(listing: Listing) -> Dataset:
    dataset = next((result for reader in READERS if (result := reader.read(listing)) is not None), None)
    if dataset is None:
        kinds = Counter(entry.path.rpartition(".")[2].lower() for entry in listing.entries)
        packed = [f"{count} .{kind} files: {ARCHIVES[kind]}" for kind, count in kinds.items() if kind in ARCHIVES]
        hint = f"{'; '.join(packed)}; " if packed else ""
        if listing.images:
            raise UnusableData(f"{listing.store.uri}: its images are in no known layout; expected {LAYOUTS}")
        raise UnusableData(f"{listing.store.uri}: {hint}no images; expected {LAYOUTS}")
    if {label.lower() for label in dataset.classes} <= {*split_folders.SPLITS}:
        names = ", ".join(dataset.classes)
        raise UnusableData(
            f"{listing.store.uri}: its folders ({names}) are splits, not classes; a table with the labels of "
            "the images, or a folder for every class, is missing"
        )
    return replace(dataset, left_out=[*dataset.left_out, *_other_files(listing), *_unread_parquet(listing)])


def _unread_parquet(listing: Listing) -> list[str]:
    """A line about Parquet files with images that are left out because there are image files beside them."""
    files = [entry for entry in listing.entries if entry.path.lower().endswith(archives.PARQUET)]
    if isinstance(listing.store, archives.ArchiveStore) or not files:
        return []
    try:
        packed = archives.ArchiveStore(listing.store).holds_images(files[0])
    except OSError:
        return []
    return [f"{len(files)} Parquet files with images; give their folder, or one of them"] if packed else []


def _other_files(listing: Listing) -> list[str]:
    """A line about files that are neither images nor annotations."""
    images = {entry.path for entry in listing.images}
    others = [entry.path for entry in listing.entries if entry.path not in images and not is_hidden(entry.path)]
    names = Counter(path.rpartition("/")[2].rpartition(".") for path in others)
    kinds: Counter[str] = Counter()
    for (_, dot, extension), count in names.items():
        kinds[f".{extension.lower()}" if dot else "no extension"] += count
    known = (*ANNOTATIONS, "tar", "cls") if isinstance(listing.store, archives.ArchiveStore) else ANNOTATIONS
    kinds = Counter({kind: count for kind, count in kinds.items() if kind.lstrip(".") not in known})
    if not kinds:
        return []
    counts = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common(5))
    return [f"{kinds.total()} files that are no images ({counts})"]


def _reasons(dataset: Dataset) -> str:
    return f" ({'; '.join(dataset.left_out)})" if dataset.left_out else ""


def _completed(dataset: Dataset, listing: Listing) -> Dataset:
    """The data set sorted, without duplicates, with masks, ground-truth counterfactuals and boxes."""
    remarks = list(dataset.remarks)
    images = []
    beside = {
        path for path in listing.sizes if path.split("/")[-2:-1] and path.split("/")[-2] in radiography.COMPANIONS
    }
    ordered = sorted(dataset.images, key=lambda image: (image.path, image.label, image.lung_mask == ""))
    for _, same in groupby(ordered, key=lambda image: (image.path, image.label)):
        image = next(same)
        images.append(_with_companions(image, beside) if beside else image)
    if len(images) < len(ordered):
        remarks.append(f"{len(ordered) - len(images)} repeated rows of the same image and label are merged")
    shapes = dataset.shapes
    if not shapes:
        shapes, box_remarks = _boxes(listing, [image.path for image in images])
        remarks += box_remarks
    return replace(dataset, images=images, remarks=remarks, shapes=shapes)


def _with_companions(image: LabelledImage, beside: set[str]) -> LabelledImage:
    def find(kind: str) -> str:
        return next((path for path in companions(image.path, kind) if path in beside), "")

    return replace(
        image,
        lung_mask=image.lung_mask or find("masks"),
        lesion_mask=image.lesion_mask or find("lesions"),
        ground_truth=image.ground_truth or find("ground_truth"),
    )


def _boxes(listing: Listing, paths: Sequence[str]) -> tuple[dict[str, list[Shape]], list[str]]:
    """Boxes and a remark, from ``boxes.csv`` at the root or in the only folder that contains images."""
    tops = {path.split("/")[0] for path in paths}
    for name in ("boxes.csv", *(f"{top}/boxes.csv" for top in tops if len(tops) == 1)):
        if name in listing.sizes:
            rows = boxes.parse(listing.store.read(name), name)
            by_image: dict[str, list[Shape]] = {path: [*found] for path, found in boxes.match(rows, paths).items()}
            count = sum(map(len, by_image.values()))
            unmatched = f"; {len(rows) - count} match no image" if count < len(rows) else ""
            return by_image, [f"{count} boxes on {len(by_image)} images ({name}){unmatched}"]
    return {}, []


def _filtered(dataset: Dataset, classes: Sequence[str] | None, uri: str, config: DataConfig) -> Dataset:
    existing = dataset.classes
    if not classes:
        if config.healthy_class not in existing:
            dataset.remarks.append(
                f"no image is healthy: there is no class {config.healthy_class!r}; name another by --healthy-class NAME"
            )
        return dataset
    for name in classes:
        if name not in existing:
            raise UnusableData(f"{uri}: no class {name!r}; there are {', '.join(existing)}")
    images = [image for image in dataset.images if image.label in classes]
    paths = {image.path for image in images}
    return replace(dataset, images=images, shapes={path: s for path, s in dataset.shapes.items() if path in paths})
