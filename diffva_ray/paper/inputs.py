"""The films that ``diffva paper`` works on: those given, a few of each class, or phantoms in both layouts."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from diffva_ray.config.recipe import DataConfig
from diffva_ray.data.chexpert import OBSERVATIONS
from diffva_ray.data.dataset import Dataset, Film
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.encoding import encode_grey, quantise
from diffva_ray.data.phantoms import make_phantoms, phantom
from diffva_ray.progress import LOG
from diffva_ray.schema import digest
from diffva_ray.storage.store import open_store

SEEDS = {"radiography": 4, "chexpert": 5}  # of phantoms; 0 to 3 are the demo's
COPIED = "copied.json"


def phantom_radiography(uri: str, per_class: int, size: int) -> str:
    """Phantoms of the paper's four classes in the Radiography layout, unless they are there; returns ``uri``."""
    make_phantoms(uri, 4 * per_class, size, SEEDS["radiography"])
    return uri


def phantom_chexpert(uri: str, per_class: int, size: int) -> str:
    """Phantoms with an enlarged heart, and healthy ones, in CheXpert's layout (``train.csv``, written last); returns
    ``uri``."""
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
        film = phantom(label, patient, SEEDS["chexpert"], size).film
        store.put(name, encode_grey(quantise(film)))
        positive = ["1.0" if column == observation else "" for column in OBSERVATIONS]
        table.writerow([f"CheXpert-v1.0-small/{name}", "Unknown", "0", "Frontal", "PA", *positive])
    store.put("train.csv", sink.getvalue().encode())
    return uri


def drawn(films: Sequence[Film], per_class: int) -> list[Film]:
    """At most ``per_class`` films of each class, drawn by the digest of their paths: the same ones every time, and the
    smaller draw is part of the larger."""
    ordered = sorted(films, key=lambda film: (film.label, digest(film.path)))
    taken: dict[str, int] = {}
    kept = []
    for film in ordered:
        taken[film.label] = taken.get(film.label, 0) + 1
        if taken[film.label] <= per_class:
            kept.append(film)
    return kept


def copy_films(dataset: Dataset, films: Sequence[Film], uri: str) -> str:
    """Those films with their masks, lesions, twins and boxes as a set of their own in the Radiography layout, byte for
    byte; returns ``uri``. Nothing happens where that has been done."""
    store = open_store(uri)
    if store.exists(COPIED):
        return uri
    boxes = io.StringIO()
    table = csv.writer(boxes, lineterminator="\n")
    table.writerow(["file", "x", "y", "w", "h"])
    for film in films:
        ending = film.path.rpartition(".")[2]
        # folders of CheXpert tell its films apart, and their names do not
        stem = film.path.rpartition(".")[0].replace("/", "_")[-80:]
        name = f"{digest(film.path)[:6]}-{stem}"
        store.put(f"{film.label}/images/{name}.{ending}", dataset.store.read(film.path))
        for kind, path in (("masks", film.lung_mask), ("lesions", film.lesion_mask), ("twins", film.twin)):
            if path:
                store.put(f"{film.label}/{kind}/{name}.{path.rpartition('.')[2]}", dataset.store.read(path))
        table.writerows([f"{film.label}/images/{name}.{ending}", *box] for box in dataset.boxes.get(film.path, []))
    if any(film.path in dataset.boxes for film in films):
        store.put("boxes.csv", boxes.getvalue().encode())
    store.put(COPIED, b"{}")
    return uri


def limited(uri: str, config: DataConfig, classes: Sequence[str] | None, per_class: int | None, out: str) -> str:
    """``uri`` itself, or a copy of ``per_class`` films of each class at ``out``. Raises UnusableData."""
    if per_class is None:
        return uri
    dataset = open_dataset(uri, config, classes)
    here = [film for film in dataset.films if film.size >= 0]
    return copy_films(dataset, drawn(here, per_class), out)
