"""The tables of ``diffva score``, on a terminal and as files."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd
from rich.markup import escape
from rich.table import Table

from diffva_ray.data.dataset import UnusableData
from diffva_ray.evaluate import tables
from diffva_ray.evaluate.external_scores import Scored
from diffva_ray.evaluate.scores import LocalizationScores
from diffva_ray.evaluate.summary import terminal
from diffva_ray.generate.run_json import RUN
from diffva_ray.storage.store import Store, open_store

COLUMNS = {
    "map": "map", "label": "class", "n": "n", "auroc": "AUROC", "auroc_interval": "95% interval", "auprc": "AUPRC",
    "dice_fixed": "Dice at t", "dice_best": "Dice best", "pointing_game": "pointing",
}  # fmt: skip
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
    store.put("tables/images.csv", tables.csv(images))
    store.put(
        tables.THRESHOLDS_FILE,
        json.dumps(tables.best_thresholds(LocalizationScores.of(scored.images)), indent=1).encode(),
    )
    store.put("tables/metrics.json", json.dumps(tables.clean(scored.metrics), indent=1).encode())


def print_scores(metrics: dict[str, Any]) -> None:
    """Print the table, the counts and the notes."""
    # table
    console = terminal()
    rows = metrics["localization"]
    regions = ", ".join(sorted({row["region"] for row in rows}))
    smoothing = f"smoothing {metrics['smoothing']:g} of the side" if metrics["smoothing"] else "not smoothed"
    title = f"Localisation of the lesion (region: {regions}; grid {metrics['grid']} px; {smoothing})"
    displayed = {key: head for key, head in COLUMNS.items() if any(row.get(key) is not None for row in rows)}
    table = Table(title=title, title_justify="left", header_style="bold")
    for key, head in displayed.items():
        table.add_column(head, justify="left" if key in ("map", "label") else "right", no_wrap=key != "label")
    for before, row in zip([None, *rows], rows):
        if before is not None and before["map"] != row["map"]:
            table.add_section()
        table.add_row(*(escape(_cell(row.get(key))) for key in displayed))
    console.print(table)
    if any(row.get("threshold_from") for row in rows):
        first = next(row for row in rows if row.get("threshold_from"))
        console.print(f"fixed thresholds t are from {first['threshold_from']}", markup=False, highlight=False)
    # counts and notes
    maps, images = metrics["maps"], metrics["images"]
    console.print(
        f"{maps['found']} maps: {maps['scored']} scored, {maps['without_image']} without image, {maps['unreadable']} "
        f"unreadable; {images['found']} images, {images['with_lesion_truth']} with lesion truth, of which "
        f"{images['with_lesion_truth_without_map']} have no map", highlight=False,
    )  # fmt: skip
    for note in metrics["notes"]:
        console.print(f"note: {note}", markup=False, highlight=False)


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "–".join(f"{part:.3f}" for part in value) if all(part == part for part in value) else ""
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)
