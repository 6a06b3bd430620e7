"""Input images of ``diffva paper``: a data set, a sample of each class, or phantoms in both layouts."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from diffva_ray.config.recipe import DataConfig
from diffva_ray.data.dataset import Dataset, LabelledImage, UnusableData
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.encoding import encode_grey, quantise
from diffva_ray.data.images import BadImage, decode
from diffva_ray.data.phantoms import phantom
from diffva_ray.data.readers.chexpert import OBSERVATIONS
from diffva_ray.data.shapes import Box
from diffva_ray.progress import LOG
from diffva_ray.schema import Image, digest
from diffva_ray.storage.opening import open_file, open_store

SEEDS = {"radiography": 4, "chexpert": 5}  # of phantoms; the demo uses 0 to 3
COPIED = "copied.json"


def phantom_chexpert(uri: str, per_class: int, size: int) -> str:
    """Write healthy phantoms and phantoms with an enlarged heart in CheXpert's layout, unless they exist.

    ``train.csv`` is written last and marks the set as complete. Returns ``uri``.
    """
    store = open_store(uri)
    if store.exists("train.csv"):
        return uri
    LOG.info("making %d phantoms in %s", 2 * per_class, uri)
    sink = io.StringIO()
    table = csv.writer(sink, lineterminator="\n")
    table.writerow(["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *OBSERVATIONS])
    for patient in range(2 * per_class):
        label, observation = (("Normal", "No Finding"), ("Cardiomegaly", "Cardiomegaly"))[patient % 2]
        name = f"train/patient{patient + 1:05d}/study1/view1_frontal.png"
        image = phantom(label, patient, SEEDS["chexpert"], size).image
        store.put(name, encode_grey(quantise(image)))
        positive = ["1.0" if column == observation else "" for column in OBSERVATIONS]
        table.writerow([f"CheXpert-v1.0-small/{name}", "Unknown", "0", "Frontal", "PA", *positive])
    store.put("train.csv", sink.getvalue().encode())
    return uri


def read_image(uri: str, bits: int = 16) -> Image:
    """The pixels [H, W] in [0, 1] of the image that --carcinoma names. Raises UnusableData."""
    try:
        store, name = open_file(uri)
        return decode(store.read(name), bits=bits)
    except (OSError, BadImage) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error
        raise UnusableData(f"--carcinoma {uri}: {reason}") from None


def sampled(images: Sequence[LabelledImage], per_class: int, seed: int = 0) -> list[LabelledImage]:
    """At most ``per_class`` existing images of each class, in an order that ``seed`` decides.

    A smaller sample is part of a larger one.
    """
    taken: dict[str, int] = {}
    kept = []
    existing = [image for image in images if image.size >= 0]
    for image in sorted(existing, key=lambda image: (image.label, digest([seed, image.path]))):
        taken[image.label] = taken.get(image.label, 0) + 1
        if taken[image.label] <= per_class:
            kept.append(image)
    return kept


def copy_images(dataset: Dataset, images: Sequence[LabelledImage], uri: str) -> str:
    """Copy images with their masks, lesions, ground truth and boxes into the Radiography layout, unless done before.

    Files are copied byte for byte. Returns ``uri``.
    """
    store = open_store(uri)
    if store.exists(COPIED):
        return uri
    boxes, boxed = io.StringIO(), 0
    table = csv.writer(boxes, lineterminator="\n")
    table.writerow(["file", "x", "y", "w", "h"])
    for image in images:
        path_stem, _, ending = image.path.rpartition(".")
        # the whole path goes into the name: CheXpert's file names repeat in every folder
        name = f"{digest(image.path)[:6]}-{path_stem.replace('/', '_')[-80:]}"
        store.put(f"{image.label}/images/{name}.{ending}", dataset.store.read(image.path))
        companions = {"masks": image.lung_mask, "lesions": image.lesion_mask, "ground_truth": image.ground_truth}
        for kind, path in companions.items():
            if path:
                store.put(f"{image.label}/{kind}/{name}.{path.rpartition('.')[2]}", dataset.store.read(path))
        outlined = dataset.lesion_shapes(image.path, image.label)
        boxes_of = [shape for shape in outlined if isinstance(shape, Box) and not shape.width]
        table.writerows([f"{image.label}/images/{name}.{ending}", box.x, box.y, box.w, box.h] for box in boxes_of)
        boxed += len(boxes_of)
    if boxed:
        store.put("boxes.csv", boxes.getvalue().encode())
    store.put(COPIED, b"{}")
    return uri


def limited(uri: str, config: DataConfig, per_class: int | None, out: str, seed: int = 0) -> str:
    """``uri``, or with ``per_class`` a copy of a random sample of each class at ``out``. Raises UnusableData."""
    if per_class is None:
        return uri
    dataset = open_dataset(uri, config)
    return copy_images(dataset, sampled(dataset.images, per_class, seed), out)


@dataclass(frozen=True)
class Sample:
    """A random sample of one class of a data set."""

    uri: str  # a data set with this sample in the class
    size: int  # images in the sample
    available: int  # images of the class


def drawn(uri: str, config: DataConfig, label: str, size: int, out: str, seed: int) -> Sample:
    """Draw ``size`` images of class ``label`` into a copy at ``out``, or take ``uri`` if it has no more. Raises
    UnusableData without any."""
    dataset = open_dataset(uri, config, [label])
    available = sum(image.size >= 0 for image in dataset.images)
    if available <= size:
        return Sample(uri, available, available)
    return Sample(copy_images(dataset, sampled(dataset.images, size, seed), out), size, available)
