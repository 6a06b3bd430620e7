"""Writes an export: ``export.json`` says of what, then the files of records, the card, and ``_SUCCESS`` last.

Every file appears whole or not at all and depends on the run and the options alone, so an interrupted export continues
with the files that are missing, and exports of the same run are equal byte by byte.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from diffva_ray._version import __version__
from diffva_ray.config.recipe import fingerprint_difference
from diffva_ray.data.dataset import UnusableData
from diffva_ray.evaluate.annotations import THRESHOLDS_FILE, lesion_shapes
from diffva_ray.evaluate.records import Lesions, read_json
from diffva_ray.evaluate.reduction import Incomplete, parts_digest
from diffva_ray.export.acceptance import Rule
from diffva_ray.export.card import Choice, card, license_of
from diffva_ray.export.contents import Contents
from diffva_ray.export.formats import FORMATS, Format
from diffva_ray.export.lineage import croissant, lineage
from diffva_ray.export.selection import DEFAULT_SPLITS, REJECTED, Counts, Selection, best_samples, has_own_splits
from diffva_ray.export.writing import LocalWriter, Work
from diffva_ray.generate.data_identity import check_same
from diffva_ray.generate.run import SUCCESS, FingerprintDiffers, Run
from diffva_ray.generate.verification import MANIFEST, verify
from diffva_ray.progress import LOG
from diffva_ray.provenance import missing, version
from diffva_ray.schema import digest
from diffva_ray.storage.opening import open_file, open_store
from diffva_ray.storage.store import Store

ABOUT, CARD, REJECTED_FILE = "export.json", "README.md", "rejected.parquet"
LINEAGE, CROISSANT = "lineage.json", "croissant.json"
WITH_REGIONS = ("coco", "dicom")  # formats that hold the map above a threshold


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The options of ``diffva export``."""

    format: str  # a name of FORMATS
    images: bool = True  # False: leave out the images that show the source image
    accept: str = ""  # rule over the columns of the records; empty: all records
    best_of: str = ""  # score by which the best sample of an image is chosen; empty: all samples
    splits: Mapping[str, float] | None = None  # shares by name; None: the data set's own splits, else DEFAULT_SPLITS
    threshold: float | None = None  # of COCO and DICOM regions; None: the run's own
    patients: bool = False  # copy the patient data of DICOM headers into a DICOM export
    banner: bool = False  # burn a mark into the counterfactuals of a DICOM export
    license: str = ""  # licence of the export; empty: as the card decides
    shuffle: int | None = None  # seed by which the records are shuffled; None: the order of the plan
    boxes: str | None = None  # CSV of lesion boxes
    anonymous: bool = False  # whether ids replace the names of files


@dataclass(frozen=True)
class Exported:
    """The result of an export."""

    counts: Counts
    rule: Rule
    fresh: bool  # False: the export was complete, and nothing was written


def export_run(run: Run, out: str, options: ExportOptions, writer: LocalWriter | None = None) -> Exported:
    """Write a reduced run as a data set that others can load.

    Args:
        run: The run.
        out: The folder of the export, local or on an object store.
        options: Format and contents.
        writer: Writes the files of records; None: this process.

    Returns:
        What the export holds, and whether anything was written.

    Raises:
        UnusableData: The run has not been reduced, an option or a source image cannot be used, or ``out`` holds
            something else.
        FingerprintDiffers: ``out`` holds an export of another run, or one with other options.
        Incomplete: Shards of the run are missing or damaged.
        DamagedPart: An image of the run is damaged.
        StoreError: A store fails.
    """
    # What is exported.
    _check_reduced(run)
    rule = Rule(options.accept, run.records_schema)
    shape, store = FORMATS[options.format], open_store(out)
    _check_packages(options.format, shape)
    threshold = _threshold(run, options) if options.format in WITH_REGIONS else None
    contents = Contents(run, store, options.images, threshold, options.patients, options.banner, options.anonymous)
    shares = options.splits or (None if has_own_splits(run) else DEFAULT_SPLITS)
    best = best_samples(run, rule, options.best_of) if options.best_of else None
    selection = Selection(run, rule, shares, _shards_per_file(run, shape), best, options.shuffle)
    counts = selection.count()
    if not counts.accepted:
        raise UnusableData(f'--accept "{rule.text}": no record of {run.store.uri} is accepted')
    # Whether the folder is free, or holds the same export.
    about = _about(run, contents, options, rule, shares)
    _claim(store, about)
    listed = {path for path, _ in store.list()}
    if SUCCESS in listed:
        return Exported(counts, rule, fresh=False)
    # The files, the card, the marker.
    pending = {key for key in counts.files if shape.path(key[1], key[0]) not in listed}
    if pending:
        check_same(run, run.data)
        work = Work(selection, contents, shape, frozenset(pending), _lesions(run, options.boxes))
        for paths in (writer or LocalWriter()).write(work, sorted({number for number, _ in pending})):
            for path in paths:
                LOG.info("export: wrote %s", path)
    if options.accept or options.best_of:
        store.put(REJECTED_FILE, _rejected(selection, contents.anonymous))
    license_id = license_of(run, options.license)
    _put_json(store, LINEAGE, lineage(run, about, counts))
    _put_json(store, CROISSANT, croissant(contents, shape, about, license_id))
    for path, content in (shape.index(counts.files) if shape.index else {}).items():
        _put_json(store, path, content)
    choice = Choice(counts, rule, options.best_of, shares)
    store.put(CARD, card(contents, options.format, shape, choice, options.license).encode())
    store.put(SUCCESS, json.dumps({"records": counts.accepted, "splits": counts.splits}).encode())
    return Exported(counts, rule, fresh=True)


def _check_packages(name: str, shape: Format) -> None:
    for package in shape.needs:
        if version(package) == "absent":
            raise UnusableData(missing(package, f"--to {name}", name))


def _check_reduced(run: Run) -> None:
    """What is published has been verified, and its numbers are of the records that are there."""
    if damage := verify(run, pixels=False):
        raise Incomplete(damage, run.store.uri)
    reduced = read_json(run, SUCCESS)
    if reduced is None or reduced.get("parts") != parts_digest(run):
        state = "has not been reduced" if reduced is None else "has changed since it was reduced"
        raise UnusableData(f"{run.store.uri} {state}; run diffva reduce first")


def _threshold(run: Run, options: ExportOptions) -> float:
    """The threshold of regions: the given one, else the best one of the run."""
    stored = read_json(run, THRESHOLDS_FILE) or {}
    threshold = options.threshold or stored.get("positive")
    if threshold is None:
        raise UnusableData(f"{run.store.uri} has no threshold of its own, because no lesion is known; give --threshold")
    return float(threshold)


def _shards_per_file(run: Run, shape: Format) -> int:
    records = min(shape.records, shape.pixels // run.recipe.model.resolution**2)
    return max(1, records // run.recipe.generate.shard_size)


def _about(
    run: Run, contents: Contents, options: ExportOptions, rule: Rule, shares: Mapping[str, float] | None
) -> dict[str, Any]:
    """Everything that the bytes of the export depend on."""
    manifest = (read_json(run, MANIFEST) or {}).get("files", {})
    files = {path: entry.get("sha256") for path, entry in manifest.items() if not path.endswith("run.json")}
    boxes = None
    if options.boxes:
        folder, name = open_file(options.boxes)
        boxes = hashlib.sha256(folder.read(name)).hexdigest()
    return {
        "format": options.format,
        "run": run.fingerprint,
        "files": digest(files),
        "images": contents.with_images,
        "accept": rule.text,
        "best_of": options.best_of,
        "splits": "own" if shares is None else dict(shares),
        "threshold": contents.threshold,
        "patients": contents.patients,
        "banner": contents.banner,
        "license": options.license,
        "boxes": boxes,
        "shuffle": options.shuffle,
        "anonymous": contents.anonymous,
        "diffva_ray": __version__,
    }


def _claim(store: Store, about: dict[str, Any]) -> None:
    """Write ``export.json``. Raises FingerprintDiffers if another export is there, UnusableData for other files."""
    if not store.exists(ABOUT) and store.list():
        raise UnusableData(f"--out {store.uri}: the folder holds other files; name a new one")
    if store.put_if_absent(ABOUT, json.dumps(about, indent=1).encode()):
        return
    try:
        old = json.loads(store.read(ABOUT))
    except ValueError:
        raise UnusableData(f"--out {store.uri}: {ABOUT} is damaged; name a new folder") from None
    if different := fingerprint_difference(old, about):
        raise FingerprintDiffers(store.uri, different, old, about)


def _lesions(run: Run, boxes: str | None) -> Lesions:
    notes = list[str]()
    lesions = lesion_shapes(run.about["data"], run.recipe.data, boxes, notes)
    if notes:
        raise UnusableData(f"{notes[0]}; name its folder with --data")
    return lesions


def _put_json(store: Store, path: str, content: Mapping[str, Any]) -> None:
    store.put(path, json.dumps(content, indent=1).encode())


def _rejected(selection: Selection, anonymous: bool) -> bytes:
    """The table of the records that are left out."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, REJECTED, compression="zstd") as writer:
        for table in selection.rejected(anonymous):
            writer.write_table(table.cast(REJECTED))
    return sink.getvalue()
