"""One pass over the records of a run: the few columns that tables need of every record, and the whole rows of the few
records that are looked at one by one. What is kept of a record takes about 150 bytes."""

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

from diffva_ray.evaluate.records import Boxes, setting_names
from diffva_ray.generate.committed import OVERLAYS, parts
from diffva_ray.generate.plan import SWEPT
from diffva_ray.generate.run import Run
from diffva_ray.schema import RECORDS, Row, Status, digest

SAMPLE = 100  # images of a class and setting whose pictures are read again, at most
NUMBERS = ("ssim", "ms_ssim", "ms_ssim_scales", "psnr", "l1", "attribution_energy",
           "attribution_energy_lung_fraction", "judge_image", "judge_counterfactual")  # fmt: skip
Setting = tuple[Any, ...]  # the values of SWEPT
ShardRef = tuple[int, int]  # where a record is stored: retry (0 is the run itself) and shard


@dataclass(frozen=True, kw_only=True)
class RunIndex:
    """What is known of all records of a run.

    ``frame``: the ``ok`` records in plan order, with columns ``label``, ``image`` (its place among ``images``),
    ``sample``, those of NUMBERS, ``trained_on`` (the model has seen the image; where that is known) and ``setting``
    (where a run has several). ``ids``: their record ids, bytes. ``images``: the paths of their images, sorted.
    ``shards_of``: the rows of ``frame`` that a shard holds, in its order. ``truth``: shards_of of images whose lesions
    may be known. ``settings``: their names. ``quarantined``: all other records. ``sampled`` and ``asked``: whole rows,
    in plan order: of at most SAMPLE images of a class and setting, and of the images that were asked for.
    """

    frame: pd.DataFrame
    ids: NDArray[np.bytes_]
    images: pa.Array
    shards_of: dict[ShardRef, NDArray[np.intp]]
    truth: list[ShardRef]
    settings: dict[Setting, str]
    quarantined: pa.Table
    sampled: list[Row]
    asked: list[Row]

    def paths(self, rows: NDArray[np.intp]) -> list[str]:
        """The images' paths of some rows of ``frame``."""
        return self.images.take(pa.array(self.frame["image"].to_numpy()[rows])).to_pylist()


def index_run(
    run: Run,
    boxes: Boxes | None = None,
    asked: Container[str] = (),
    trained_on: Callable[[str | None], bool] | None = None,
    most: int = SAMPLE,
) -> RunIndex:
    """The index_run of what a run has committed. ``asked``: images, by path, whose rows are kept whole; ``trained_on``:
    whether the image of a sha256 was trained on."""
    total = int(run.about["records"])
    numbers = {name: np.empty(total) for name in NUMBERS}
    ids, label, setting, sample = np.empty(total, "S20"), *(np.empty(total, kind) for kind in (np.int16, np.int16, int))
    trained = np.zeros(total, bool)
    labels, settings, chosen = dict[str, int](), dict[Setting, int](), _Sample(most)
    paths, quarantined, whole = list[pa.ChunkedArray](), list[pa.Table](), list[Row]()
    shards_of, truth, at = dict[ShardRef, list[NDArray[np.intp]]](), dict[ShardRef, None](), 0
    for shard, table in parts(run, RECORDS.names):
        good = pc.equal(table["status"], Status.OK.value)
        if not pc.all(good).as_py():
            quarantined.append(table.filter(pc.invert(good)))
            table = table.filter(good)
        here = slice(at, at + len(table))
        of_label, of_image = table["label"].to_pylist(), table["image_path"].to_pylist()
        of_setting = list(zip(*(table[key].to_pylist() for key in SWEPT), strict=True))
        ids[here] = table["record_id"].to_pylist()
        label[here] = [labels.setdefault(name, len(labels)) for name in of_label]
        setting[here] = [settings.setdefault(values, len(settings)) for values in of_setting]
        sample[here] = table["sample"]
        for name, column in numbers.items():
            column[here] = table[name].to_numpy()
        if trained_on is not None:
            trained[here] = [trained_on(sha256) for sha256 in table["image_sha256"].to_pylist()]
        paths.append(table["image_path"].cast(pa.large_string()))  # 32-bit offsets end at 2 GiB
        for shard_ref, members in _homes(table, shard):
            shards_of.setdefault(shard_ref, []).append(members + at)
            if _truth_known(table.take(members), boxes or {}):
                truth[shard_ref] = None
        chosen.see(table, zip(of_label, of_setting, strict=True), of_image)
        wanted = np.flatnonzero([image in asked for image in of_image])
        whole += table.take(wanted).to_pylist()
        at += len(table)

    images, image = _places(paths)
    names = setting_names(list(settings))
    frame = pd.DataFrame({name: column[:at] for name, column in numbers.items()}, copy=False)
    frame["label"] = pd.Categorical.from_codes(label[:at], list(labels))
    frame["image"], frame["sample"] = image, sample[:at]
    if trained_on is not None:
        frame["trained_on"] = trained[:at]
    if len(settings) > 1:
        frame["setting"] = pd.Categorical.from_codes(setting[:at], [names[values] for values in settings])
    looked_at = chosen.rows()
    for row in (*looked_at, *whole) if len(settings) > 1 else ():
        row["setting"] = names[tuple(row[key] for key in SWEPT)]
    return RunIndex(
        frame=frame,
        ids=ids[:at],
        images=images,
        shards_of={shard_ref: np.concatenate(members) for shard_ref, members in shards_of.items()},
        truth=list(truth),
        settings=names,
        quarantined=pa.concat_tables(quarantined) if quarantined else RECORDS.empty_table(),
        sampled=looked_at,
        asked=whole,
    )


def _homes(table: pa.Table, shard: int) -> Iterator[tuple[ShardRef, NDArray[np.intp]]]:
    """Where the records of a part are stored (a retried one with its retry), and which they are."""
    retried = pc.starts_with(table["counterfactual_path"], f"{OVERLAYS}/").to_numpy()
    if not retried.all():
        yield (0, shard), np.flatnonzero(~retried)
    found: dict[ShardRef, list[int]] = {}
    for row in np.flatnonzero(retried):
        _, retry, _, name, _ = table["counterfactual_path"][int(row)].as_py().split("/")
        found.setdefault((int(retry[1:]), int(name.rpartition("-")[2])), []).append(int(row))
    for shard_ref, rows in found.items():
        yield shard_ref, np.array(rows)


def _truth_known(table: pa.Table, boxes: Boxes) -> bool:
    if boxes and not boxes.keys().isdisjoint(table["image_path"].to_pylist()):
        return True
    return any(pc.any(pc.not_equal(table[name], "")).as_py() for name in ("lesion_mask_path", "ground_truth_path"))


def _places(paths: list[pa.ChunkedArray]) -> tuple[pa.Array, NDArray[np.int64]]:
    """The distinct paths, sorted, and the place of each path among them."""
    chunks = [chunk for column in paths for chunk in column.chunks]
    column = pa.chunked_array(chunks, pa.large_string()).combine_chunks()
    images = pc.unique(column).sort()
    return images, pc.index_in(column, images).to_numpy().astype(np.int64)


class _Sample:
    """At most ``most`` records of each class and setting, by the digest of their images' paths: the same images in
    every run and setting."""

    def __init__(self, most: int) -> None:
        self.most, self.seen = most, 0
        self.best: dict[tuple[str, Setting], list[tuple[int, int, int, Row]]] = {}  # heaps; the worst is first

    def see(self, table: pa.Table, keys: Iterator[tuple[str, Setting]], images: list[str]) -> None:
        records = table["record_id"].to_pylist()
        for n, (key, image, record) in enumerate(zip(keys, images, records, strict=True)):
            heap = self.best.setdefault(key, [])
            rank = -int(digest(image), 16), -int(record, 16), self.seen + n
            if len(heap) < self.most:
                heapq.heappush(heap, (*rank, table.slice(n, 1).to_pylist()[0]))
            elif rank > heap[0][:3]:
                heapq.heapreplace(heap, (*rank, table.slice(n, 1).to_pylist()[0]))
        self.seen += len(table)

    def rows(self) -> list[Row]:
        """In the order in which they were seen."""
        found = [(number, row) for heap in self.best.values() for _, _, number, row in heap]
        return [row for _, row in sorted(found, key=lambda pair: pair[0])]
