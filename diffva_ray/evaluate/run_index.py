"""Reads all records of a run in one pass, keeping about 150 bytes of each.

Kept are the columns that the tables need of every record, and whole rows of the few records whose images are read.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from diffva_ray.config.sampling import SWEEPABLE
from diffva_ray.evaluate.records import Lesions, setting_key, setting_names
from diffva_ray.generate.committed import parts
from diffva_ray.generate.run import Run
from diffva_ray.generate.run_json import OVERLAYS
from diffva_ray.schema import Record, Status, digest

SAMPLE = 100  # images of a class and setting that are read again, at most
NUMBERS = ("ssim", "ms_ssim", "ms_ssim_scales", "psnr", "l1", "attribution_energy",
           "attribution_energy_lung_fraction", "judge_image", "judge_counterfactual")  # fmt: skip
SettingKey = tuple[Any, ...]  # sampling settings and prompt: the values of SWEEPABLE
ShardRef = tuple[int, int]  # where a record is stored: number of the retry (0: the run itself), number of the shard


class IndexedRecord(Record, total=False):
    """A record with the name of its setting, in a run with several."""

    setting: str


@dataclass(frozen=True, kw_only=True)
class RunIndex:
    """All records of a run, in plan order."""

    # the ``ok`` records, with the columns ``label``, ``image`` (index into ``images``), ``sample``, NUMBERS,
    # ``group`` (number of the patient, or of the image where the patient is unknown; if any is known), ``trained_on``
    # (whether the model was trained on the image; if known) and ``setting`` (of a run with several)
    frame: pd.DataFrame
    ids: NDArray[np.bytes_]  # record ids of ``frame``
    images: pa.Array  # paths of the images, sorted
    shards_of: dict[ShardRef, NDArray[np.intp]]  # rows of ``frame`` in each shard, in the shard's order
    truth: list[ShardRef]  # shards with images whose lesions may be known
    settings: dict[SettingKey, str]  # names of the settings
    quarantined: pa.Table  # all other records, with all columns
    sampled: list[IndexedRecord]  # whole rows of at most SAMPLE images of each class and setting
    requested: list[IndexedRecord]  # whole rows of the requested images

    def paths(self, rows: NDArray[np.intp]) -> list[str]:
        """The image paths of some rows of ``frame``."""
        paths: list[str] = self.images.take(pa.array(self.frame["image"].to_numpy()[rows])).to_pylist()
        return paths


def index_run(
    run: Run,
    lesions: Lesions | None = None,
    requested: Container[str] = (),
    trained_on: Callable[[str | None], bool] | None = None,
    max_images: int = SAMPLE,
) -> RunIndex:
    """Index the committed records of a run.

    ``requested``: paths of images whose whole rows are kept. ``trained_on``: whether the model was trained on the image
    with a sha256. ``max_images``: number of images per class and setting in ``sampled``."""
    # arrays for all planned records; cut to the ``ok`` ones at the end
    total = int(run.about["records"])
    numbers = {name: np.empty(total) for name in NUMBERS}
    ids, label, setting, sample = np.empty(total, "S20"), *(np.empty(total, kind) for kind in (np.int16, np.int16, int))
    trained = np.zeros(total, bool)
    labels, settings, chosen = dict[str, int](), dict[SettingKey, int](), _Sample(max_images)
    paths, quarantined, whole = list[pa.ChunkedArray](), list[pa.Table](), list[IndexedRecord]()
    patients = list[pa.ChunkedArray]()
    shards_of, truth, count = dict[ShardRef, list[NDArray[np.intp]]](), dict[ShardRef, None](), 0
    for shard, table in parts(run, run.records_schema.names):
        ok = pc.equal(table["status"], Status.OK.value)
        if not pc.all(ok).as_py():
            quarantined.append(table.filter(pc.invert(ok)))
            table = table.filter(ok)
        # columns of every record
        here = slice(count, count + len(table))
        of_label, of_image = table["label"].to_pylist(), table["image_path"].to_pylist()
        of_setting = list(zip(*(table[key].to_pylist() for key in SWEEPABLE), strict=True))
        ids[here] = table["record_id"].to_pylist()
        label[here] = [labels.setdefault(name, len(labels)) for name in of_label]
        setting[here] = [settings.setdefault(values, len(settings)) for values in of_setting]
        sample[here] = table["sample"]
        for name, column in numbers.items():
            column[here] = table[name].to_numpy()
        if trained_on is not None:
            trained[here] = [trained_on(sha256) for sha256 in table["image_sha256"].to_pylist()]
        paths.append(table["image_path"].cast(pa.large_string()))  # 32-bit offsets end at 2 GiB
        patients.append(table["patient"].cast(pa.large_string()))
        # where the records are stored
        for shard_ref, members in _shard_refs(table, shard):
            shards_of.setdefault(shard_ref, []).append(members + count)
            if _truth_known(table.take(members), lesions or {}):
                truth[shard_ref] = None
        # whole rows of a few records
        chosen.add(table, zip(of_label, of_setting, strict=True), of_image)
        wanted = np.flatnonzero([image in requested for image in of_image])
        whole += table.take(wanted).to_pylist()
        count += len(table)

    images, image = _image_index(paths)
    names = setting_names(list(settings))
    frame = pd.DataFrame({name: column[:count] for name, column in numbers.items()}, copy=False)
    frame["label"] = pd.Categorical.from_codes(label[:count], list(labels))
    frame["image"], frame["sample"] = image, sample[:count]
    if (group := _groups(patients, image)) is not None:
        frame["group"] = group
    if trained_on is not None:
        frame["trained_on"] = trained[:count]
    if len(settings) > 1:
        frame["setting"] = pd.Categorical.from_codes(setting[:count], [names[values] for values in settings])
    sampled = chosen.rows()
    for row in (*sampled, *whole) if len(settings) > 1 else ():
        row["setting"] = names[setting_key(row)]
    return RunIndex(
        frame=frame,
        ids=ids[:count],
        images=images,
        shards_of={shard_ref: np.concatenate(members) for shard_ref, members in shards_of.items()},
        truth=list(truth),
        settings=names,
        quarantined=pa.concat_tables(quarantined) if quarantined else run.records_schema.empty_table(),
        sampled=sampled,
        requested=whole,
    )


def _shard_refs(table: pa.Table, shard: int) -> Iterator[tuple[ShardRef, NDArray[np.intp]]]:
    """Yields where the records of a part are stored (a retried one with its retry), with their rows in ``table``."""
    retried = pc.starts_with(table["counterfactual_path"], f"{OVERLAYS}/").to_numpy()
    if not retried.all():
        yield (0, shard), np.flatnonzero(~retried)
    by_ref: dict[ShardRef, list[int]] = {}
    for row in np.flatnonzero(retried):
        _, retry, _, name, _ = table["counterfactual_path"][int(row)].as_py().split("/")
        by_ref.setdefault((int(retry[1:]), int(name.rpartition("-")[2])), []).append(int(row))
    for shard_ref, rows in by_ref.items():
        yield shard_ref, np.array(rows)


def _truth_known(table: pa.Table, lesions: Lesions) -> bool:
    if lesions and not lesions.keys().isdisjoint(table["image_path"].to_pylist()):
        return True
    return any(pc.any(pc.not_equal(table[name], "")).as_py() for name in ("lesion_mask_path", "ground_truth_path"))


def _image_index(paths: list[pa.ChunkedArray]) -> tuple[pa.Array, NDArray[np.int64]]:
    """The distinct paths, sorted, and the index of each path among them."""
    chunks = [chunk for column in paths for chunk in column.chunks]
    column = pa.chunked_array(chunks, pa.large_string()).combine_chunks()
    images = pc.unique(column).sort()
    return images, pc.index_in(column, images).to_numpy().astype(np.int64)


def _groups(patients: list[pa.ChunkedArray], image: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """The group of each record: its patient, or its image where the patient is unknown; None if all are unknown."""
    column = pa.chunked_array([chunk for part in patients for chunk in part.chunks], pa.large_string())
    known = pc.not_equal(column, "").to_numpy() if len(column) else np.zeros(0, bool)
    if not known.any():
        return None
    codes: NDArray[np.int64] = pc.index_in(column, pc.unique(column)).to_numpy().astype(np.int64)
    return np.where(known, codes, codes.max() + 1 + image)


class _Sample:
    """At most ``size`` records of each class and setting, chosen by the digest of the image path, so that every run and
    setting has the same images."""

    def __init__(self, size: int) -> None:
        self.size, self.seen = size, 0
        self.best: dict[
            tuple[str, SettingKey], list[tuple[int, int, int, IndexedRecord]]
        ] = {}  # heaps, the worst record first

    def add(self, table: pa.Table, keys: Iterator[tuple[str, SettingKey]], images: list[str]) -> None:
        """Consider the records of ``table``; ``keys``: their (class, setting)."""
        records = table["record_id"].to_pylist()
        for n, (key, image, record) in enumerate(zip(keys, images, records, strict=True)):
            heap = self.best.setdefault(key, [])
            rank = -int(digest(image), 16), -int(record, 16), self.seen + n
            if len(heap) < self.size:
                heapq.heappush(heap, (*rank, table.slice(n, 1).to_pylist()[0]))
            elif rank > heap[0][:3]:
                heapq.heapreplace(heap, (*rank, table.slice(n, 1).to_pylist()[0]))
        self.seen += len(table)

    def rows(self) -> list[IndexedRecord]:
        """The chosen records in the order in which they were added."""
        chosen = [(number, row) for heap in self.best.values() for _, _, number, row in heap]
        return [row for _, row in sorted(chosen, key=lambda item: item[0])]
