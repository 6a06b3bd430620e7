"""Which records are exported, and into which split and file each of them goes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from diffva_ray.data.dataset import UnusableData
from diffva_ray.evaluate.anonymous import image_id
from diffva_ray.export import best_of
from diffva_ray.export.acceptance import Rule
from diffva_ray.generate.committed import parts
from diffva_ray.generate.run import Run
from diffva_ray.schema import Status, digest

DEFAULT_SPLITS = {"train": 0.8, "validation": 0.1, "test": 0.1}
COLUMNS = (  # that the choice and its counts need
    "record_id", "image_sha256", "status", "error", "label", "patient", "image_path", "split", "ssim",
    "attribution_energy_lung_fraction", "judge_image", "judge_counterfactual",
)  # fmt: skip
REJECTED = pa.schema([(name, pa.string()) for name in ("record_id", "image_path", "label", "reason")])
MERGED = 100_000  # hashes that wait at least
NOT_BEST = "another sample of the image is better"
SPELLINGS = {"valid": "validation", "val": "validation", "dev": "validation"}


def parse_splits(text: str) -> dict[str, float]:
    """``train=0.8,test=0.2`` as shares by name. Raises UnusableData."""
    shares: dict[str, float] = {}
    for item in text.split(","):
        name, _, share = item.partition("=")
        try:
            shares[name.strip()] = float(share)
        except ValueError:
            shares = {}
            break
    if not shares or not all(re.fullmatch(r"[A-Za-z]\w*", name) and share > 0 for name, share in shares.items()):
        raise UnusableData(f"--splits {text}: write names and shares, as in train=0.8,test=0.2")
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise UnusableData(f"--splits {text}: the shares add up to {sum(shares.values()):g}, not to 1")
    return shares


@dataclass
class Sums:
    """Sums over records, from which an export's numbers before and after the choice are computed."""

    records: int = 0
    ssim: float = 0.0
    in_lungs: float = 0.0  # of attribution_energy_lung_fraction, over the records that have it
    with_lungs: int = 0
    flipped: int = 0  # called abnormal before and healthy after
    called_abnormal: int = 0

    def add(self, table: pa.Table) -> None:
        ssim, lungs, before, after = (
            table[name].cast(pa.float64()).to_numpy()
            for name in ("ssim", "attribution_energy_lung_fraction", "judge_image", "judge_counterfactual")
        )
        abnormal = (before <= 0.5) & ~np.isnan(after)
        self.records += len(table)
        self.ssim += float(np.nansum(ssim))
        self.in_lungs += float(np.nansum(lungs))
        self.with_lungs += int((~np.isnan(lungs)).sum())
        self.flipped += int((abnormal & (after > 0.5)).sum())
        self.called_abnormal += int(abnormal.sum())


@dataclass
class ClassCount:
    """The records of a class with status ``ok``."""

    all: Sums = field(default_factory=Sums)
    accepted: Sums = field(default_factory=Sums)


@dataclass
class Counts:
    """What an export holds."""

    classes: dict[str, ClassCount] = field(default_factory=dict)
    files: dict[tuple[int, str], int] = field(default_factory=dict)  # records by number of the file and split
    images: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))  # hash of each image, sorted
    patients: dict[str, set[str]] = field(default_factory=dict)  # splits by known patient; only for own splits

    @property
    def accepted(self) -> int:
        """Number of exported records."""
        return sum(self.files.values())

    @property
    def splits(self) -> dict[str, int]:
        """Number of records by split: train, validation and test first, others by name."""
        total: dict[str, int] = {}
        for (_, split), count in self.files.items():
            total[split] = total.get(split, 0) + count
        order = {name: n for n, name in enumerate(DEFAULT_SPLITS)}
        return {name: total[name] for name in sorted(total, key=lambda name: (order.get(name, 9), name))}

    @property
    def images_digest(self) -> str:
        """Digest of the paths and contents of all images of the run with a record that is ok, in any order."""
        return hashlib.sha256(self.images.astype("<u8").tobytes()).hexdigest()

    @property
    def shared_patients(self) -> int:
        """Number of patients with records in several splits."""
        return sum(len(splits) > 1 for splits in self.patients.values())


@dataclass(frozen=True)
class Selection:
    """The choice of records, and their splits. ``shares`` None: the data set's own splits."""

    run: Run
    rule: Rule
    shares: Mapping[str, float] | None
    shards_per_file: int
    best: pa.Array | None = None  # ids of the best samples; None: all samples
    shuffle: int | None = None  # seed of the order of the records; None: the order of the plan

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        """The shards in the order in which they fill the files."""
        shards = np.arange(self.run.shards)
        return shards if self.shuffle is None else np.random.default_rng(self.shuffle).permutation(shards)

    @cached_property
    def _places(self) -> NDArray[np.int64]:
        """The place of each shard in that order."""
        return np.argsort(self._order)

    def shards(self, number: int) -> NDArray[np.int64]:
        """The shards whose records are in the files with a number."""
        first = number * self.shards_per_file
        return np.sort(self._order[first : first + self.shards_per_file])

    def ordered(self, table: pa.Table) -> pa.Table:
        """The records of a file in their order there."""
        if self.shuffle is None:
            return table
        keys = [digest(["shuffle", self.shuffle, record]) for record in table["record_id"].to_pylist()]
        return table.take(pa.array(np.argsort(np.array(keys, str), kind="stable")))

    def _number(self, shard: int) -> int:
        """The number of the file that has the records of a shard."""
        return (shard if self.shuffle is None else int(self._places[shard])) // self.shards_per_file

    def chosen(self, shard: int, table: pa.Table) -> Iterator[tuple[tuple[int, str], pa.Table]]:
        """The accepted ``ok`` records of a shard by (number of the file, split)."""
        table = table.filter(pc.equal(table["status"], Status.OK.value))
        table = table.filter(pa.array(self._accepts(table)))
        splits = self._splits(table)
        for split in np.unique(splits):
            yield (self._number(shard), str(split)), table.filter(pa.array(splits == split))

    def count(self) -> Counts:
        """One pass over the records, of which a few columns are read."""
        counts, waiting = Counts(), [np.empty(0, np.uint64)]  # waiting: hashes of images, merged when they are many
        for shard, table in parts(self.run, self.columns):
            ok = table.filter(pc.equal(table["status"], Status.OK.value))
            accepted = self._accepts(ok)
            waiting.append(_image_hashes(ok))
            if sum(map(len, waiting[1:])) > max(MERGED, len(waiting[0])):
                waiting = [np.unique(np.concatenate(waiting))]
            labels = np.array(ok["label"].to_pylist(), str)
            for label in np.unique(labels):
                of_class, here = counts.classes.setdefault(str(label), ClassCount()), labels == label
                of_class.all.add(ok.filter(pa.array(here)))
                of_class.accepted.add(ok.filter(pa.array(here & accepted)))
            for key, rows in self.chosen(shard, table):
                counts.files[key] = counts.files.get(key, 0) + len(rows)
                if self.shares is None:
                    for patient in filter(None, rows["patient"].to_pylist()):
                        counts.patients.setdefault(patient, set()).add(key[1])
        counts.images = np.unique(np.concatenate(waiting))
        return counts

    def rejected(self, anonymous: bool) -> Iterator[pa.Table]:
        """The records that are not exported, each with the reason, by shard. ``anonymous``: without names of files."""
        for _, table in parts(self.run, self.columns):
            reasons = self.rule.reasons(table)
            rows = zip(table["status"].to_pylist(), table["error"].to_pylist(), reasons, self._is_best(table))
            texts = [
                (status if anonymous else f"{status}: {error}")
                if status != Status.OK.value
                else reason or ("" if best else NOT_BEST)
                for status, error, reason, best in rows
            ]
            named = table.select(REJECTED.names[:-1]).append_column("reason", pa.array(texts, pa.string()))
            if anonymous:
                ids = pa.array(map(image_id, table["image_path"].to_pylist()), pa.string())
                named = named.set_column(named.column_names.index("image_path"), "image_path", ids)
            yield named.filter(pc.not_equal(named["reason"], ""))

    @property
    def columns(self) -> list[str]:
        """The columns of the records that the choice needs."""
        return sorted({*COLUMNS, *self.rule.columns})

    def _accepts(self, ok: pa.Table) -> NDArray[np.bool_]:
        return self.rule.accepts(ok) & self._is_best(ok)

    def _is_best(self, table: pa.Table) -> NDArray[np.bool_]:
        if self.best is None:
            return np.ones(len(table), bool)
        held: NDArray[np.bool_] = pc.is_in(table["record_id"], self.best).to_numpy()
        return held

    def _splits(self, table: pa.Table) -> NDArray[np.str_]:
        if self.shares is None:
            return np.array([own_split(name) for name in table["split"].to_pylist()], str)
        names, bounds = list(self.shares), np.cumsum(list(self.shares.values()))
        persons = (patient or path for patient, path in zip(*(table[n].to_pylist() for n in ("patient", "image_path"))))
        places = [int(digest(["split", person])[:13], 16) / 16**13 for person in persons]
        return np.array([names[min(n, len(names) - 1)] for n in np.searchsorted(bounds, places, side="right")], str)


def _image_hashes(table: pa.Table) -> NDArray[np.uint64]:
    pairs = zip(table["image_path"].to_pylist(), table["image_sha256"].to_pylist())
    return np.array([int(digest(pair)[:16], 16) for pair in pairs], np.uint64)


def own_split(name: str) -> str:
    """The name of a data set's split as ``datasets`` accepts it."""
    plain = re.sub(r"\W+", "_", name.strip().lower()).strip("_")
    return SPELLINGS.get(plain, plain)


def has_own_splits(run: Run) -> bool:
    """Whether the data set has given every record of the run a split."""
    return all(all(map(own_split, table["split"].to_pylist())) for _, table in parts(run, ["split"]))


def best_samples(run: Run, rule: Rule, score: str) -> pa.Array:
    """The ids of the best accepted samples of the images of a run."""
    columns = sorted({"status", score, *best_of.COLUMNS, *rule.columns})

    def accepted() -> Iterator[pa.Table]:
        for _, table in parts(run, columns):
            ok = table.filter(pc.equal(table["status"], Status.OK.value))
            yield ok.filter(pa.array(rule.accepts(ok)))

    return best_of.best_records(accepted(), score)
