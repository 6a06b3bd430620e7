"""An expert's verdicts as a data set: a manifest with the images, their labels, and masks of corrected regions."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image as Pillow

from diffva_ray.data.encoding import encode_mask
from diffva_ray.evaluate.records import read_source
from diffva_ray.evaluate.tables import csv
from diffva_ray.schema import Mask
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import Store, join
from diffva_ray.studio.workspace import Reply, Workspace, safe_name

VERDICTS = ("accepted", "rejected")
MANIFEST, BOXES = "manifest.csv", "boxes.csv"
COLUMNS = ["path", "label", "lesion", "verdict", "record_id", "prompt"]


def save_verdict(workspace: Workspace, reply: Reply, verdict: str, label: str, region: Mask | None) -> str:
    """Write a verdict to ``feedback/`` of the workspace; returns the address of the manifest.

    The image becomes a row of the manifest, under the expert's ``label``, in place of an earlier verdict on the same
    record. A painted region becomes its lesion mask, and its bounding box in pixels of the image a row of BOXES."""
    record, store = reply.record, open_store(join(workspace.uri, "feedback"))
    image = f"images/{record['image_sha256'][:12]}-{safe_name(record['image_path'])}"
    store.put_if_absent(image, read_source(reply.run.data, record))
    row: dict[str, Any] = {"path": image, "label": label.strip() or record["label"], "lesion": "", "verdict": verdict}
    size = record["width"], record["height"]
    if region is not None:
        row["lesion"] = f"lesions/{record['record_id']}.png"
        full = Pillow.fromarray(region).resize(size, Pillow.Resampling.NEAREST)
        store.put(row["lesion"], encode_mask(np.asarray(full)))
    row |= {"record_id": record["record_id"], "prompt": record["prompt"]}
    rows = [old for old in _rows(store, MANIFEST) if old["record_id"] != row["record_id"]]
    store.put(MANIFEST, csv(pd.DataFrame([*rows, row], columns=COLUMNS)).encode())
    boxes = [old for old in _rows(store, BOXES) if old["file"] != image]
    if region is not None:
        across, down = (np.flatnonzero(np.asarray(full).any(axis=axis)) for axis in (0, 1))
        corner, end = (across[0], down[0]), (across[-1] + 1, down[-1] + 1)
        boxes.append({"file": image, "x": corner[0], "y": corner[1], "w": end[0] - corner[0], "h": end[1] - corner[1]})
    store.put(BOXES, csv(pd.DataFrame(boxes, columns=["file", "x", "y", "w", "h"])).encode())
    return join(store.uri, MANIFEST)


def _rows(store: Store, name: str) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = pd.read_csv(io.BytesIO(store.read(name)), keep_default_na=False).to_dict("records")
    except FileNotFoundError:
        return []
    return rows
