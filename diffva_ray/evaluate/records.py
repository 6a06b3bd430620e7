"""Reading a run back: its records, and the images and truth behind each of them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from diffva_ray.data.dataset import LabelledImage
from diffva_ray.data.images import BadImage, decode, decode_map, decode_mask, to_square
from diffva_ray.generate.committed import OVERLAYS, PATHS, committed
from diffva_ray.generate.plan import SWEPT
from diffva_ray.generate.run import Run, part
from diffva_ray.metrics.localization import boxes_mask
from diffva_ray.schema import Row, Status
from diffva_ray.storage.store import Store

Boxes = dict[str, list[tuple[float, float, float, float]]]


def read_records(run: Run) -> pd.DataFrame:
    """All committed records of a run (``open_run``), in plan order, with the columns of ``schema.RECORDS``; an empty
    frame with the same columns when there are none. Raises StoreError when the store fails."""
    return committed(run).to_pandas()


def setting_names(settings: Sequence[tuple[Any, ...]]) -> dict[tuple[Any, ...], str]:
    """What to call each of a run's settings (values of SWEPT) by what of it is swept: “COVID 19”, strength 0.3. Empty
    for the setting of a run that has one."""
    varied = [n for n in range(len(SWEPT)) if len({setting[n] for setting in settings}) > 1]

    def said(key: str, value: Any) -> str:
        return f"“{value}”" if key == "prompt" else f"{_plain(key)} {_short(value)}"

    return {setting: ", ".join(said(SWEPT[n], setting[n]) for n in varied) for setting in settings}


def under(name: str, setting: str) -> str:
    """``COVID under strength 0.3``; the name alone where a run has one setting."""
    return f"{name} under {setting}" if setting else name


def _plain(key: str) -> str:
    return {"guidance_scale": "guidance", "num_inference_steps": "steps"}.get(key, key)


def _short(value: Any) -> str:
    if isinstance(value, str):
        return value
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def stored_records(run: Run, shard_ref: tuple[int, int]) -> list[Row]:
    """The ``ok`` records that one shard of a run, or of its n-th retry (``shard_ref``: n, shard), holds itself; paths
    are relative to ``run``."""
    retry, shard = shard_ref
    folder = f"{OVERLAYS}/r{retry}/" if retry else ""
    table = pq.read_table(io.BytesIO(run.store.read(f"{folder}records/{part(shard)}.parquet")))
    rows = table.filter(pc.equal(table["status"], Status.OK.value)).to_pylist()
    return [{**row, **{name: f"{folder}{row[name]}" for name in PATHS}} for row in rows]


def by_shard(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """``ok`` records by shard, in the order given: (folder that holds it, such as "" or "overlays/r1/"; its name)."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        folder, name, _ = row["counterfactual_path"].rsplit("/", 2)
        found.setdefault((folder.removesuffix("counterfactuals"), name), []).append(row)
    return found


@dataclass(frozen=True)
class RecordImages:
    """The pictures of one record, float32 [size, size]; grey in [0, 1], the map signed in [-1, 1]."""

    image: NDArray[np.float32]
    counterfactual: NDArray[np.float32]
    reconstruction: NDArray[np.float32]
    signed_map: NDArray[np.float32]


@dataclass(frozen=True)
class Truth:
    """What is known about an image's lesion: masks bool [size, size], the ground-truth counterfactual float32 in [0,
    1]."""

    lesion: NDArray[np.bool_] | None = None
    lungs: NDArray[np.bool_] | None = None
    counterfactual: NDArray[np.float32] | None = None

    @property
    def region(self) -> NDArray[np.bool_] | None:
        """Where a map is scored: lungs or lesion when the lungs are known, else the whole image."""
        if self.lungs is None or self.lesion is None:
            return self.lungs
        return self.lungs | self.lesion


def grey(store: Store, path: str) -> NDArray[np.float32]:
    """A stored 8-bit picture as float32 in [0, 1]."""
    return np.asarray(Image.open(io.BytesIO(store.read(path))).convert("L"), np.float32) / np.float32(255)


def read_images(run: Run, row: Row) -> RecordImages:
    """The four pictures of an ``ok`` record, a row of ``read_records`` as a dictionary.

    Raises FileNotFoundError or BadImage when a file is gone or damaged, StoreError when the store fails.
    """
    size = run.recipe.model.resolution
    return RecordImages(
        to_square(decode(run.data.read(row["image_path"]), bits=run.recipe.data.bits), size),
        grey(run.store, row["counterfactual_path"]),
        grey(run.store, row["reconstruction_path"]),
        decode_map(run.store.read(row["attribution_path"])),
    )


def read_truth(run: Run, row: Row, boxes: Boxes) -> Truth:
    """What the data set knows about a record's image, its ground-truth counterfactual included."""
    size = run.recipe.model.resolution
    image = LabelledImage(
        row["image_path"], row["label"], -1, row["lung_mask_path"] or "", row["lesion_mask_path"] or ""
    )
    truth = image_truth(run.data, image, boxes, row["width"], row["height"], size)
    try:
        path, bits = row["ground_truth_path"], run.recipe.data.bits
        ground_truth = to_square(decode(run.data.read(path), bits=bits), size) if path else None
    except (OSError, BadImage):
        ground_truth = None
    return replace(truth, counterfactual=ground_truth)


def image_truth(data: Store, image: LabelledImage, boxes: Boxes, width: int, height: int, size: int) -> Truth:
    """What a data set knows about the lesion of an image of ``width`` x ``height``, as masks [size, size]; boxes count
    where there is no lesion mask, and a mask that cannot be read is none."""

    def mask(path: str) -> NDArray[np.bool_] | None:
        try:
            return decode_mask(data.read(path), size) if path else None
        except (OSError, BadImage):
            return None

    lesion = mask(image.lesion_mask)
    if lesion is None and image.path in boxes:
        lesion = boxes_mask(boxes[image.path], width, height, size)
    return Truth(lesion, mask(image.lung_mask))


def finished(records: pd.DataFrame) -> pd.DataFrame:
    """The ``ok`` records."""
    return records[records["status"] == Status.OK.value]


def reduced_metrics(run: Run) -> dict[str, Any] | None:
    """``tables/metrics.json``; None when the run has not been reduced."""
    return _json(run, "tables/metrics.json")


def _json(run: Run, path: str) -> dict[str, Any] | None:
    try:
        return json.loads(run.store.read(path))
    except FileNotFoundError:
        return None
