"""Reads annotations of images: Brixia scores and source archives from CSV, lesion lesions, and fixed thresholds."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from diffva_ray.config.recipe import DataConfig
from diffva_ray.data.boxes import file_of, match, read_boxes
from diffva_ray.data.dataset import UnusableData
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.tables import Table, read_table
from diffva_ray.evaluate.records import Lesions
from diffva_ray.metrics.zones import ZONES
from diffva_ray.storage.opening import open_file, open_store

Zones = dict[str, NDArray[np.float64]]  # Brixia scores [6] by image path
THRESHOLDS_FILE = "tables/thresholds.json"  # of a run: its best thresholds
READERS = ("S", "J")  # senior and junior radiologist, columns S-A ... J-F


def read_zones(uri: str, paths: Iterable[str]) -> Zones:
    """Read Brixia scores [6] (zones A to F, mean of the readers, 0 to 3) by image path.

    The CSV has the columns ``file`` and ``S-A`` ... ``S-F``, ``J-A`` ... ``J-F`` (one reader is enough). Raises
    UnusableData that names the row."""
    table = _table("--brixia", uri)
    readers = [reader for reader in READERS if {f"{reader}-{zone}" for zone in ZONES} <= set(table.columns)]
    if not readers:
        raise UnusableData(f"--brixia {uri}: needs the columns file and S-A to S-F (or J-A to J-F)")
    rows: list[tuple[str, str, NDArray[np.float64]]] = []
    for where, row in table.rows:
        texts = [[row[f"{reader}-{zone}"].strip() for zone in ZONES] for reader in readers]
        complete = [reader for reader in texts if all(reader)]
        if not complete:
            continue
        try:
            scores = np.array(complete, dtype=float)
            if not ((scores >= 0) & (scores <= 3)).all():
                raise ValueError
        except ValueError:
            raise UnusableData(f"{where}: zone scores are numbers from 0 to 3") from None
        rows.append((where, file_of(row), scores.mean(axis=0)))
    return {path: np.mean(values, axis=0) for path, values in match(rows, paths).items()}


def read_sources(uri: str, paths: Iterable[str]) -> dict[str, str]:
    """Read the source archive by image path from a CSV with ``file`` and ``source``. Raises UnusableData."""
    table = _table("--sources", uri)
    if "source" not in table.columns:
        raise UnusableData(f"--sources {uri}: needs the columns file and source")
    rows = [(where, file_of(row), row["source"].strip()) for where, row in table.rows if row["source"].strip()]
    return {path: values[0] for path, values in match(rows, paths).items()}


def _table(option: str, uri: str) -> Table:
    store, name = open_file(uri)
    try:
        table = read_table(store.read(name), name)
    except OSError as error:
        raise UnusableData(f"{option} {uri}: cannot be read ({error})") from None
    if "file" not in table.columns:
        raise UnusableData(f"{option} {uri}: needs the column file")
    return table


def lesion_shapes(data_uri: str, config: DataConfig, csv: str | None, notes: list[str]) -> Lesions:
    """The outlined lesions by image path: the boxes of ``csv``, else the data set's own boxes, polygons and masks.

    ``config``: section ``data`` of the recipe. Empty, with a note, when the data set cannot be opened. Raises
    UnusableData for a ``csv`` that cannot be used."""
    try:
        dataset = open_dataset(data_uri, config)
    except UnusableData as error:
        notes.append(f"data not opened for boxes and references: {error}")
        return {}
    if csv is None:
        return dataset.shapes
    store, name = open_file(csv)
    try:
        boxes = read_boxes(store.read(name), dataset.images, name)
    except OSError as error:
        raise UnusableData(f"--boxes {csv}: cannot be read ({error})") from None
    if not boxes:
        raise UnusableData(f"--boxes {csv}: none of its files is an image of {data_uri}")
    return boxes


def of_finding(map_name: str, label: str) -> str:
    """The name, in a file of thresholds, of a map's threshold for one class."""
    return f"{map_name} for {label}"


def read_thresholds(uri: str) -> dict[str, float]:
    """Read the thresholds of a reduced (validation) run. Raises UnusableData when it has not been reduced."""
    try:
        thresholds: dict[str, float] = json.loads(open_store(uri).read(THRESHOLDS_FILE))
    except FileNotFoundError:
        raise UnusableData(f"--threshold-from {uri}: no thresholds there; reduce that run first") from None
    return thresholds
