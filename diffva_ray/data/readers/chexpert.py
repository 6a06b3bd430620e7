"""Reads CheXpert (Irvin et al. 2019), small and full, with any of its label files; one image per positive label.

Header lines: https://stanfordaimi.azurewebsites.net/datasets/8cbd9ed4-2eb9-4565-affc-111cf4f7ebe2. The full set comes
as folders ``CheXpert-v1.0 batch N (...)``, in which paths differ from those of the tables.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from diffva_ray.config.recipe import DataConfig
from diffva_ray.data.columns import is_lateral
from diffva_ray.data.dataset import Dataset, UnusableData
from diffva_ray.data.listing import KNOWN_TABLES, Collection, Listing, base, folder
from diffva_ray.data.tables import Table

KIND = "chexpert"
LAYOUT = "CheXpert"
FILES = r"(^|/)patient\d{5}/study\d+/view\d+_(frontal|lateral)\.jpg$"
TABLES = ("train.csv", "valid.csv", "val.csv", "test.csv", "val_labels.csv", "test_labels.csv")
OTHER_LABELS = ("train_visualCheXbert.csv", "train_cheXbert.csv")  # by other labellers, of the same images
SPLITS = {"train": "train", "valid": "val", "val": "val", "test": "test"}
SPLIT_FOLDER = re.compile(r"(?:^|[/(])(train|valid|val|test)[^/]*/patient\d{5}/")
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


class Observations:
    """Reads the labels of CheXpert's labeller: 1 positive, 0 negative, -1 uncertain, empty not mentioned."""

    def __init__(self, config: DataConfig) -> None:
        self.policy = config.uncertain
        self.uncertain: Counter[str] = Counter()

    def positive(self, row: Mapping[str, str], where: str) -> list[str]:
        """The observations of a row that count as positive, also uncertain ones under the policy ``positive``; the
        policies ``ignore`` and ``negative`` leave them out."""
        labels = []
        for observation in OBSERVATIONS:
            value = _value(row.get(observation, ""), f"{where}: {observation}")
            self.uncertain[observation] += value == -1
            if value == 1 or (value == -1 and self.policy == "positive"):
                labels.append(observation)
        return labels

    def remarks(self) -> list[str]:
        """A line about the uncertain labels, if there were any."""
        counts = ", ".join(f"{observation} {count}" for observation, count in sorted((+self.uncertain).items()))
        return [f"{self.uncertain.total()} uncertain labels (-1), policy {self.policy!r}: {counts}"] if counts else []


def read(listing: Listing, tables: Sequence[str] = TABLES) -> Dataset | None:
    """Frontal images, one entry for each positive observation; None when the folder has no such tables.

    Tables of which no image exists (only ``valid/`` was unpacked) are left out. Raises UnusableData.
    """
    # find the tables, which are in one folder
    found = _tables(listing, tables) or _tables(listing, OTHER_LABELS[:1]) or _tables(listing, OTHER_LABELS[1:])
    if not found:
        listing.require(LAYOUT, "train.csv or valid.csv", "labels", FILES)
        return None
    folders = sorted({folder(path) for path in found})
    if len(folders) > 1:
        raise UnusableData(f"{listing.store.uri}: has several CheXpert sets ({', '.join(folders)}); give one of them")
    # collect the images of the tables whose images exist
    observations = Observations(listing.config)
    why = f"{base(next(iter(found)))} has the column Path and observations of CheXpert"
    images = Collection(listing, KIND, why, issuer=KIND)
    for path, table in found.items():
        if any(_locate(listing, row["Path"], folders[0]) for _, row in table.rows):
            _add(images, observations, path, table)
        else:
            images.left_out[f"images of {base(path)}, none of which exists"] += len(table.rows)
    if not images.images:
        reasons = "; ".join(f"{count} {what}" for what, count in images.left_out.items())
        raise UnusableData(f"{listing.store.uri}: no image is left: {reasons}")
    others = [base(path) for path in _tables(listing, OTHER_LABELS) if path not in found]
    if others:
        images.remarks.append(f"labels of {base(next(iter(found)))}; give the path of {' or '.join(others)} for others")
    images.remarks += observations.remarks()
    if tables is TABLES:
        for split in sorted(_splits_of_files(listing) - {_split(path) for path in found}):
            images.lacks(f"the table of split {split}", "its images have no labels")
    return images.dataset()


def _tables(listing: Listing, names: Sequence[str]) -> dict[str, Table]:
    """The tables of CheXpert by path, of those called ``names`` at most KNOWN_TABLES folders deep."""
    keep = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *OBSERVATIONS)
    paths = [path for path in listing.sizes if base(path) in names and path.count("/") <= KNOWN_TABLES]
    tables = {path: listing.table(path, keep) for path in sorted(paths, key=lambda path: names.index(base(path)))}
    return {path: table for path, table in tables.items()
            if "Path" in table.columns and not set(OBSERVATIONS).isdisjoint(table.columns)}  # fmt: skip


def _split(table: str) -> str:
    return next((split for start, split in SPLITS.items() if base(table).startswith(start)), "")


def _splits_of_files(listing: Listing) -> set[str]:
    """The splits whose images are there, by their folders: ``train``, or a batch such as ``... batch 2 (train 1)``."""
    matches = filter(None, (SPLIT_FOLDER.search(entry.path) for entry in listing.images))
    return {SPLITS[match[1]] for match in matches}


def _add(images: Collection, observations: Observations, name: str, table: Table) -> None:
    split = _split(name)
    for where, row in table.rows:
        text = row["Path"].replace("\\", "/")
        view = row.get("AP/PA", "") or row.get("Frontal/Lateral", "").upper()
        path = _locate(images.listing, text, folder(name))
        if is_lateral(row.get("Frontal/Lateral", "")) or "_lateral." in text:
            images.skip(path, "lateral views")
            continue
        patient = next((part for part in text.split("/") if part.startswith("patient")), "")
        images.add(path, text, observations.positive(row, where), patient, view=view, sex=row.get("Sex", ""),
                   age=row.get("Age", ""), split=split)  # fmt: skip


def _locate(listing: Listing, text: str, above: str) -> str | None:
    """Path of an image: as the table says, from the table's folder, or by patient, study and view, because the top
    folder may have been renamed, and the batches of the full set have none."""
    text = text.replace("\\", "/")
    inner = text.partition("/")[2]
    return listing.exact(above + text) or listing.exact(above + inner) or listing.image(text, 3)


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
