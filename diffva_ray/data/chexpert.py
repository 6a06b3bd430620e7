"""Reads CheXpert-v1.0-small: ``train.csv`` and ``valid.csv`` beside their folders; one image per positive label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from diffva_ray.config.recipe import DataConfig
from diffva_ray.data.dataset import Dataset, LabelledImage, UnusableData
from diffva_ray.data.manifest import Table, inside, read_table
from diffva_ray.storage.store import Entry, Store

LAYOUT = "train.csv (CheXpert)"
TABLES = ("train.csv", "valid.csv")
HEALTHY = "No Finding"
OBSERVATIONS = (
    HEALTHY,
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)


def read(store: Store, entries: list[Entry], config: DataConfig, tables: Sequence[str] = TABLES) -> Dataset | None:
    """Frontal images, one entry for each observation that is 1; None when the folder has no such tables.

    ``No Finding`` becomes class ``config.healthy_class``. An uncertain observation (-1) gives an entry only under the
    policy ``positive``; ``ignore`` and ``negative`` give the same entries. The root is the folder of the tables or the
    one above it. Images whose file is absent are kept with size -1; a table without any existing image (only ``valid/``
    was unpacked) is left out; a note reports both. Raises UnusableData.
    """
    # find the tables, grouped by their folder
    sizes = {entry.path: entry.size for entry in entries}
    bases: dict[str, dict[str, Table]] = {}  # "" or "folder/" -> table name -> table
    for path in sizes:
        folder, slash, name = path.rpartition("/")
        if name in tables and "/" not in folder:
            table = read_table(store.read(path), path)
            if "Path" in table.columns and not set(OBSERVATIONS).isdisjoint(table.columns):
                bases.setdefault(folder + slash, {})[name] = table
    if not bases:
        return None
    if len(bases) > 1:
        raise UnusableData(f"{store.uri}: has several CheXpert sets ({', '.join(sorted(bases))}); give one of them")
    base, base_tables = bases.popitem()
    # collect the images of the tables whose images exist
    images: list[LabelledImage] = []
    notes = [f"{HEALTHY!r} is class {config.healthy_class!r}"]
    for name, table in base_tables.items():
        table_images, table_notes = _images(table, base, sizes, config)
        if any(image.size >= 0 for image in table_images):
            images += table_images
            notes += [f"{name}: {text}" for text in table_notes]
        else:
            notes.append(f"{name}: left out, none of its {len(table.rows)} images exists")
    if not images:
        raise UnusableData(f"{store.uri}: {'; '.join(notes[1:])}")
    return Dataset(store, images, "chexpert", notes)


def _images(
    table: Table, base: str, sizes: dict[str, int], config: DataConfig
) -> tuple[list[LabelledImage], list[str]]:
    """Images of one table, and notes about what was left out."""
    observations = [observation for observation in OBSERVATIONS if observation in table.columns]
    images: list[LabelledImage] = []
    uncertain: Counter[str] = Counter()
    lateral = unlabelled = absent = 0
    for where, row in table.rows:
        if row.get("Frontal/Lateral") == "Lateral" or row["Path"].endswith("_lateral.jpg"):
            lateral += 1
            continue
        path = _locate(row["Path"], base, sizes, where)
        labels = []
        for observation in observations:
            value = _value(row[observation], f"{where}: {observation}")
            uncertain[observation] += value == -1
            if value == 1 or (value == -1 and config.uncertain == "positive"):
                labels.append(config.healthy_class if observation == HEALTHY else observation)
        unlabelled += not labels
        absent += path not in sizes
        images += [LabelledImage(path, label, sizes.get(path, -1)) for label in labels]
    # notes, for counts above 0
    uncertain = +uncertain
    counts = ", ".join(f"{observation} {count}" for observation, count in sorted(uncertain.items()))
    notes = (
        (uncertain.total(), f"uncertain labels (-1), policy {config.uncertain!r}: {counts}"),
        (lateral, "lateral views left out"),
        (unlabelled, "frontal images without a positive label left out"),
        (absent, "frontal images do not exist"),
    )
    return images, [f"{count} {text}" for count, text in notes if count]


def _locate(text: str, base: str, sizes: dict[str, int], where: str) -> str:
    """Path of an image in the store. The tables' paths start with the original name of the data set's folder, which may
    have been renamed."""
    path = inside(text, sizes, where)
    if base + path in sizes:
        return base + path
    top, _, rest = path.partition("/")
    return base + (rest if top.startswith("CheXpert") else path)


def _value(text: str, where: str) -> int:
    if text in ("", "0.0", "0"):
        return 0
    try:
        value = float(text)
    except ValueError:
        value = 2.0
    if value not in (1, 0, -1):
        raise UnusableData(f"{where} is {text!r}; expected 1, 0, -1 or nothing")
    return int(value)
