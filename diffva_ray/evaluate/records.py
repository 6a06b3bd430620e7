"""Reads a run: its records, and the images and the ground truth of each record."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from diffva_ray.config.sampling import SWEEPABLE
from diffva_ray.data.dataset import LabelledImage
from diffva_ray.data.images import BadImage, decode, decode_grey, decode_map, decode_mask, to_square
from diffva_ray.data.masks import Files
from diffva_ray.data.shapes import Shape, lesion_mask
from diffva_ray.generate.committed import PATHS, committed
from diffva_ray.generate.planned_files import PlannedFiles
from diffva_ray.generate.run import DamagedPart, Run, find_run, part
from diffva_ray.generate.run_json import OVERLAYS, repair_command
from diffva_ray.schema import Record, Status
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import Modified, Store, join

Lesions = Mapping[str, Sequence[Shape]]  # lesions that the data set outlines, by image path


def read_records(run: Run) -> pd.DataFrame:
    """Read all committed records of a run.

    Args:
        run: A run, as ``open_run`` returns it.

    Returns:
        The records in plan order, with the columns of ``schema.RECORDS``; retried records as their last retry left
        them. Without committed records an empty frame with the same columns.

    Raises:
        StoreError: The store fails.
    """
    return committed(run).to_pandas()


def setting_key(record: Record) -> tuple[Any, ...]:
    """The record's sampling settings and prompt: its values of SWEEPABLE."""
    values: Mapping[str, Any] = cast("Any", record)
    return tuple(values[key] for key in SWEEPABLE)


def setting_names(settings: Sequence[tuple[Any, ...]]) -> dict[tuple[Any, ...], str]:
    """A name for each of a run's sampling settings (tuples of the values of SWEEPABLE), such as ``“COVID 19”, strength
    0.3``: the values that differ within the run; empty for a run with one setting."""
    varied = [n for n in range(len(SWEEPABLE)) if len({setting[n] for setting in settings}) > 1]

    def text(key: str, value: Any) -> str:
        return f"“{value}”" if key == "prompt" else f"{_plain(key)} {_short(value)}"

    return {setting: ", ".join(text(SWEEPABLE[n], setting[n]) for n in varied) for setting in settings}


def under(name: str, setting: str) -> str:
    """Join a name and the name of a setting: ``COVID under strength 0.3``; the name alone without a setting."""
    return f"{name} under {setting}" if setting else name


def _plain(key: str) -> str:
    return {"guidance_scale": "guidance", "num_inference_steps": "steps"}.get(key, key)


def _short(value: Any) -> str:
    if isinstance(value, str):
        return value
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def stored_records(run: Run, shard_ref: tuple[int, int]) -> list[Record]:
    """The ``ok`` records in one stored part; paths are relative to ``run``.

    ``shard_ref``: number of the retry (0: the run itself), number of the shard."""
    retry, shard = shard_ref
    folder = f"{OVERLAYS}/r{retry}/" if retry else ""
    table = pq.read_table(io.BytesIO(run.store.read(f"{folder}records/{part(shard)}.parquet")))
    records: list[Record] = table.filter(pc.equal(table["status"], Status.OK.value)).to_pylist()
    for record in records:
        for name in PATHS:
            record[name] = f"{folder}{record[name]}"
    return records


def by_shard(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """Group ``ok`` records by the stored shard, keeping their order.

    Keys are (folder of the run or retry, such as "" or "overlays/r1/"; name of the shard)."""
    shards: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        folder, name, _ = record["counterfactual_path"].rsplit("/", 2)
        shards.setdefault((folder.removesuffix("counterfactuals"), name), []).append(record)
    return shards


@dataclass(frozen=True)
class RecordImages:
    """The images of one record, float32 [size, size]."""

    image: NDArray[np.float32]  # the input, grey in [0, 1]
    counterfactual: NDArray[np.float32]  # grey in [0, 1]
    reconstruction: NDArray[np.float32]  # the autoencoder's version of the input, grey in [0, 1]
    signed_map: NDArray[np.float32]  # the attribution map, in [-1, 1]


@dataclass(frozen=True)
class Truth:
    """What the data set knows about an image; None for what is unknown. All arrays are [size, size]."""

    lesion: NDArray[np.bool_] | None = None  # lesion mask
    lungs: NDArray[np.bool_] | None = None  # lung mask
    counterfactual: NDArray[np.float32] | None = None  # the ground-truth counterfactual, grey in [0, 1]

    @property
    def region(self) -> NDArray[np.bool_] | None:
        """The region in which maps are scored: the lungs if they are known; None: the whole image. Lesion pixels
        outside the lungs do not count: if they did, every pixel scored there would be lesion."""
        return self.lungs


def grey(store: Store, path: str) -> NDArray[np.float32]:
    """Read a stored 8-bit image as float32 in [0, 1]."""
    return decode_grey(store.read(path)).astype(np.float32) / np.float32(255)


def check_own_images(run: Run, record: Record) -> None:
    """Raises DamagedPart when one of the run's own images of a record cannot be read."""
    for path in (record[name] for name in PATHS):
        try:
            (decode_map if path == record["attribution_path"] else decode_grey)(run.store.read(path))
        except (OSError, BadImage) as error:
            where = f"{run.store.uri}/{path}"
            raise DamagedPart(f"{where} cannot be read ({error}); {repair_command(run.store)}") from None


def read_input(run: Run, record: Record) -> NDArray[np.float32]:
    """Read the input image of an ``ok`` record as ``read_images``."""
    data = read_source(run.data, record)
    return to_square(decode(data, bits=run.recipe.data.bits), run.recipe.model.resolution)


def read_source(data: Store, record: Record) -> bytes:
    """Read the file of an ``ok`` record's input image. Raises BadImage for other content than the record was generated
    from."""
    content = data.read(record["image_path"])
    if isinstance(record["image_sha256"], str) and hashlib.sha256(content).hexdigest() != record["image_sha256"]:
        raise BadImage("it has changed since its record was generated")
    return content


def read_images(run: Run, record: Record) -> RecordImages:
    """Read the four images of an ``ok`` record.

    Args:
        run: The run.
        record: A row of ``read_records`` as a dictionary.

    Returns:
        Input, counterfactual, reconstruction and signed map at the run's resolution.

    Raises:
        FileNotFoundError: A file is missing.
        BadImage: A file is damaged, or the input has changed since.
        StoreError: The store fails.
    """
    return RecordImages(
        read_input(run, record),
        grey(run.store, record["counterfactual_path"]),
        grey(run.store, record["reconstruction_path"]),
        decode_map(run.store.read(record["attribution_path"])),
    )


def read_truth(run: Run, record: Record, lesions: Lesions) -> Truth:
    """Read what the data set knows about the image of a record.

    Args:
        run: The run.
        record: A row of ``read_records`` as a dictionary.
        lesions: Lesions that the data set outlines by image path, used for images without a lesion mask.

    Returns:
        Masks and ground-truth counterfactual at the run's resolution; None for a file that cannot be read or was
        written since the record was planned.

    Raises:
        StoreError: The store fails.
    """
    size = run.recipe.model.resolution
    image = LabelledImage(
        record["image_path"], record["label"], -1, record["lung_mask_path"] or "", record["lesion_mask_path"] or ""
    )
    files = _files(run, record)
    truth = image_truth(files, image, lesions, record["width"], record["height"], size)
    try:
        path, bits = record["ground_truth_path"], run.recipe.data.bits
        ground_truth = to_square(decode(files.read(path), bits=bits), size) if path else None
    except (OSError, BadImage, Modified):
        ground_truth = None
    return replace(truth, counterfactual=ground_truth)


def _files(run: Run, record: Record) -> PlannedFiles:
    """The data set's files as they were when the record was planned; a retry plans its records anew."""
    retry, found, _ = record["counterfactual_path"].rpartition("/counterfactuals/")
    planned = find_run(open_store(join(run.store.uri, retry))) if found else None
    return run.files if planned is None else PlannedFiles.of(planned.about, run.data)


def image_truth(data: Files, image: LabelledImage, lesions: Lesions, width: int, height: int, size: int) -> Truth:
    """Read the lesion and lung masks of an image of ``width`` x ``height`` as [size, size].

    The outlined lesions of the image's label (or of no label) replace a missing lesion mask; a mask that cannot be read
    or was written since planning is None."""

    def mask(path: str) -> NDArray[np.bool_] | None:
        try:
            return decode_mask(data.read(path), size) if path else None
        except (OSError, BadImage, Modified):
            return None

    lesion = mask(image.lesion_mask)
    if lesion is None:
        outlined = [shape for shape in lesions.get(image.path, ()) if shape.label in ("", image.label)]
        lesion = lesion_mask(outlined, width, height, size)
    return Truth(lesion, mask(image.lung_mask))


def as_records(frame: pd.DataFrame) -> list[Record]:
    """The rows of a frame of ``read_records`` as dictionaries; a text that is not known is None, as in a record."""
    texts = (name for name in frame if not pd.api.types.is_numeric_dtype(frame[name]))
    frame = frame.assign(**{name: frame[name].astype(object).where(frame[name].notna(), None) for name in texts})
    return cast("list[Record]", frame.to_dict("records"))


def finished(records: pd.DataFrame) -> pd.DataFrame:
    """The records with status ``ok``."""
    return records[records["status"] == Status.OK.value]


def reduced_metrics(run: Run) -> dict[str, Any] | None:
    """Read ``tables/metrics.json``; None when the run has not been reduced, or the file is damaged."""
    metrics = read_json(run, "tables/metrics.json")
    return metrics if metrics is not None and _are_metrics(metrics) else None


def _are_metrics(content: dict[str, Any]) -> bool:
    """Whether a JSON object has the shape of ``tables/metrics.json``: counts, the judge's quality, lines, tables."""
    for name, value in content.items():
        if name == "records":
            sound = isinstance(value, dict) and {"planned", "ok", "quarantined"} <= set(value)
        elif name == "judge":
            sound = isinstance(value, dict) and {"accuracy", "n", "chance", "problem"} <= set(value)
        else:
            kind = str if name in ("notes", "problems") else dict
            sound = isinstance(value, list) and all(isinstance(item, kind) for item in value)
        if not sound:
            return False
    return "records" in content


def read_json(run: Run, path: str) -> dict[str, Any] | None:
    """Read a JSON object of a run; None when it does not exist or is damaged."""
    try:
        content = json.loads(run.store.read(path))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None
