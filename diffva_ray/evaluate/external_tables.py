"""The tables of ``diffva score``, on a terminal and as files."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pandas as pd

from diffva_ray.data.dataset import UnusableData
from diffva_ray.evaluate import tables
from diffva_ray.evaluate.annotations import THRESHOLDS_FILE
from diffva_ray.evaluate.external_scores import Scored
from diffva_ray.evaluate.report.result_tables import localization_table
from diffva_ray.evaluate.scores import LocalizationScores
from diffva_ray.evaluate.summary import print_lines, print_table, terminal
from diffva_ray.generate.run_json import RUN
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import Store

CAPTION = (
    "Maps against lesion truth inside the region, mean over images; dice best and iou best use each image's own best "
    "threshold."
)


def open_output(uri: str) -> Store:
    """Open the store for ``write_scores``. Raises UnusableData for a run, whose own tables would be overwritten."""
    try:
        store = open_store(uri)
    except ValueError as error:
        raise UnusableData(f"--out {error}") from None
    if store.exists(RUN):
        raise UnusableData(f"--out {uri}: this is a run, whose tables would be overwritten; choose another folder")
    return store


def write_scores(store: Store, scored: Scored) -> None:
    """Write ``tables/scores.{csv,md,tex,json}``, ``tables/images.csv`` (one row per image and map),
    ``tables/thresholds.json`` (for ``--threshold-from``) and ``tables/metrics.json``."""
    caption = f"{CAPTION} Grid {scored.metrics['grid']} px, smoothing {scored.metrics['smoothing']:g} of the side."
    tables.write_table(store, "scores", scored.metrics["localization"], caption)
    images = pd.DataFrame(scored.images).drop(columns="dice_curve")
    store.put("tables/images.csv", tables.csv(images).encode())
    store.put(
        THRESHOLDS_FILE,
        json.dumps(tables.best_thresholds(LocalizationScores.of(scored.images)), indent=1).encode(),
    )
    store.put("tables/metrics.json", json.dumps(tables.clean(scored.metrics), indent=1).encode())


def print_scores(metrics: dict[str, Any]) -> None:
    """Print the table, the counts and the notes."""
    console = terminal()
    rows = metrics["localization"]
    regions = ", ".join(sorted({row["region"] for row in rows}))
    smoothing = f"smoothing {metrics['smoothing']:g} of the side" if metrics["smoothing"] else "not smoothed"
    title = f"Localisation of the lesion (region: {regions}; grid {metrics['grid']} px; {smoothing})"
    if table := localization_table(rows):
        print_table(console, replace(table, title=title, caption=""), intervals=True)
    source = next((row["threshold_from"] for row in rows if row.get("threshold_from")), None)
    maps, images = metrics["maps"], metrics["images"]
    print_lines(console, [
        *([f"fixed thresholds τ are from {source}"] if source else []),
        f"{maps['found']} maps: {maps['scored']} scored, {maps['without_image']} without image, {maps['unreadable']} "
        f"unreadable; {images['found']} images, {images['with_lesion_truth']} with lesion truth, of which "
        f"{images['with_lesion_truth_without_map']} have no map",
        *(f"note: {note}" for note in metrics["notes"]),
    ])  # fmt: skip
