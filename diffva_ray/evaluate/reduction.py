"""The reduce step: verify the run, compute every table, and say with ``_SUCCESS`` that it is finished.

Works from the records and what the shards stored; tables do not depend on how many workers there were.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from diffva_ray import __version__
from diffva_ray.data.boxes import read_boxes
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.films import UnusableData
from diffva_ray.evaluate import tables
from diffva_ray.evaluate.distances import distance_row, reference_features, run_features
from diffva_ray.evaluate.records import Boxes, Row, by_shard, read_records
from diffva_ray.evaluate.scores import score_records
from diffva_ray.generate.budget import check_quarantined
from diffva_ray.generate.ledger import OVERLAYS, overlays
from diffva_ray.generate.plan import PLAN_FILE, RUN, SUCCESS, Run, open_run
from diffva_ray.generate.verification import MANIFEST, Problem, verify
from diffva_ray.model.training_films import TrainingFilms
from diffva_ray.schema import RECORDS, Status, digest
from diffva_ray.storage import Store, open_store

if TYPE_CHECKING:
    from diffva_ray.metrics.features import Extractor

Scored = tuple[list[Row], list[Row]]  # localisation rows and twin rows of one shard
Score = Callable[[Run, str, list[list[Row]], Boxes], list[Scored]]


class Incomplete(Exception):
    """Shards are missing or damaged; the message says how many and what to do."""

    def __init__(self, problems: list[Problem], uri: str) -> None:
        self.problems = problems
        shards = len({(problem.overlay, problem.shard) for problem in problems})
        verb = "retry" if all(problem.overlay for problem in problems) else "generate"
        super().__init__(
            f"{uri}: {shards} shards are missing or damaged (first: {problems[0].what}); run diffva {verb} again, "
            "or diffva verify --repair"
        )


@dataclass(frozen=True)
class Options:
    """What changes the tables. ``references``: (label, data or run); ``weights``: pytorch-fid's state dict; ``cache``:
    where features of references are kept, when several runs share them (by default the run)."""

    references: tuple[tuple[str, str], ...] = ()
    boxes: str | None = None
    weights: str | None = None
    resize: str = "clean"
    threshold_from: str | None = None
    cache: str | None = None


@dataclass
class Reduced:
    """The tables of a run, as in ``tables/metrics.json``, and what had to be said on the way."""

    metrics: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    fresh: bool = True  # False: the run had been reduced like this already, nothing was written


def reduce_run(run: Run, data_uri: str, options: Options, score: Score | None = None) -> Reduced:
    """Tables, quarantine, manifest and ``_SUCCESS`` of a run.

    ``score`` spreads the scoring of shards (lists of records) over a cluster; by default they are scored here. Raises
    Incomplete, OverBudget (the tables are written, ``_SUCCESS`` is not) or UnusableData.
    """
    problems = verify(run, pixels=False)
    if problems:
        raise Incomplete(problems, run.store.uri)
    asked = {key: value for key, value in options.__dict__.items() if key != "cache"}  # it changes no number
    state = {"options": digest(asked), "fingerprint": run.fingerprint, "version": __version__,
             "retries": len(overlays(run))}  # fmt: skip
    if run.store.exists(SUCCESS) and json.loads(run.store.read(SUCCESS)) == state:
        return Reduced(json.loads(run.store.read("tables/metrics.json")), fresh=False)
    run.store.delete(SUCCESS)

    records = read_records(run)
    quarantined = records[records["status"] != Status.OK.value]
    good = records[records["status"] == Status.OK.value]
    _write_quarantine(run, quarantined)
    reduced = _compute(run, data_uri, options, good, score)
    reduced.metrics = {
        "records": {"planned": run.about["records"], "ok": len(good), "quarantined": len(quarantined)},
        **reduced.metrics,
    }
    if len(quarantined):
        counts = quarantined["status"].value_counts().to_dict()
        reduced.metrics["records"]["by_status"] = {key: int(n) for key, n in counts.items()}
    reduced.metrics["notes"] = reduced.notes
    run.store.put("tables/metrics.json", json.dumps(tables.clean(reduced.metrics), indent=1).encode())
    _write_manifest(run)

    check_quarantined(run, quarantined.to_dict("records"))
    run.store.put(SUCCESS, json.dumps(state).encode())
    return reduced


def _compute(run: Run, data_uri: str, options: Options, good: pd.DataFrame, score: Score | None) -> Reduced:
    recipe = run.recipe
    notes: list[str] = []
    boxes = lesion_boxes(data_uri, options.boxes, notes)
    rows = good.to_dict("records")
    groups = list(by_shard(rows).values())
    scored = (score or _score_here)(run, data_uri, groups, boxes)
    place = {row["record_id"]: n for n, row in enumerate(rows)}  # intervals depend on the order, so it is the plan's
    order = lambda row: place[row["record_id"]]  # noqa: E731
    found = sorted((row for localization, _ in scored for row in localization), key=order)
    twins = sorted((row for _, twin in scored for row in twin), key=order)

    thresholds, source = None, None
    if options.threshold_from:
        thresholds, source = read_thresholds(options.threshold_from), options.threshold_from.rstrip("/").split("/")[-1]
    metrics: dict[str, Any] = {
        "fid": _distances(run, data_uri, options, rows, notes),
        "ssim": tables.ssim_rows(good, recipe.generate.ssim_preset, recipe.model.resolution) if len(good) else [],
        "localization": tables.localization_rows(found, thresholds, source),
        "validity": tables.validity_rows(good) if len(good) else [],
        "twin": tables.twin_rows(twins),
    }
    _say_training_films(run, good, metrics, notes)
    if found:
        run.store.put("tables/thresholds.json", json.dumps(tables.best_thresholds(found), indent=1).encode())
    for name, table in metrics.items():
        tables.write_table(run.store, name, table, CAPTIONS[name].format(size=recipe.model.resolution))
    return Reduced({name: table for name, table in metrics.items() if table}, notes)


def _say_training_films(run: Run, good: pd.DataFrame, metrics: dict[str, Any], notes: list[str]) -> None:
    """Rows scored on films that the model was trained on say how many; so do the notes."""
    seen = TrainingFilms.of_model(str(run.about.get("model", "")), run.about["keys"]["model_digest"])
    if seen is None or not len(good):
        return
    trained = good[[seen.has(sha256) for sha256 in good["source_sha256"]]]
    if not len(trained):
        return
    notes.append(f"{len(trained)} of {len(good)} records are of films in the model's training list: this is no test")
    counts = trained["label"].value_counts().to_dict()
    for row in (row for name in ("localization", "validity", "twin") for row in metrics[name]):
        row["training_films"] = len(trained) if row["label"] == tables.ALL else int(counts.get(row["label"], 0))


def _score_here(run: Run, data_uri: str, groups: list[list[Row]], boxes: Boxes) -> list[Scored]:
    data = open_store(run.about["data_root"])
    return [score_records(run, data, group, boxes) for group in groups]


CAPTIONS = {
    "fid": "Fréchet distance between sets; extractor, resize path and N as given, interval by delete-group jackknife "
    "(bias-corrected: the plain value may lie above it).",
    "ssim": "Film against counterfactual, mean by class, on the {size} px grid.",
    "localization": "Map against lesion truth inside the region, mean over films; dice best and iou best use each "
    "film's own best threshold.",
    "validity": "Flip rate: films called abnormal by the judge whose counterfactual it calls healthy.",
    "twin": "Counterfactual against the lesion-free twin; lesion error ratio: error left inside the lesion.",
}


def read_thresholds(uri: str) -> dict[str, float]:
    """The thresholds fixed on another (validation) run. Raises UnusableData when it has not been reduced."""
    try:
        return json.loads(open_store(uri).read("tables/thresholds.json"))
    except FileNotFoundError:
        raise UnusableData(f"--threshold-from {uri}: no thresholds there; reduce that run first") from None


def lesion_boxes(data_uri: str, csv: str | None, notes: list[str]) -> Boxes:
    """Lesion boxes by film: those of ``csv``, or the data set's own; none when the data cannot be opened any more."""
    try:
        dataset = open_dataset(data_uri)
    except UnusableData as error:
        notes.append(f"data not opened for boxes and references: {error}")
        return {}
    if csv is None:
        return dataset.boxes
    folder, _, name = csv.rpartition("/")
    try:
        boxes = read_boxes(open_store(folder or ".").read(name), dataset.films, name)
    except OSError as error:
        raise UnusableData(f"--boxes {csv}: cannot be read ({error})") from None
    if not boxes:
        raise UnusableData(f"--boxes {csv}: none of its files is a film of {data_uri}")
    return boxes


def choose_extractor(weights: str | None, resize: str, grid: int, notes: list[str]) -> Extractor:
    """pytorch-fid's Inception where its weights are given, else the stand-in, openly."""
    from diffva_ray.metrics.features import inception, stand_in  # here, since it loads torch

    if weights is None:
        notes.append(
            "no Inception weights given (--inception-weights PATH): distances are of the stand-in extractor and are "
            "not FID"
        )
        return stand_in()
    return inception(weights, "legacy" if resize == "legacy" else "clean", grid=grid)


def _distances(run: Run, data_uri: str, options: Options, rows: list[Row], notes: list[str]) -> list[Row]:
    """The rows of tables 1 and 2: for each class (and each prompt, where there are several), source to counterfactual,
    and each reference to both."""
    recipe = run.recipe
    extractor = choose_extractor(options.weights, options.resize, recipe.model.resolution, notes)
    # by film, so that what compares the same two sets under other settings has the same interval
    rows = sorted(rows, key=lambda row: (row["source_path"], row["record_id"]))
    features = run_features(run, open_store(run.about["data_root"]), rows, extractor)
    references = []
    wanted = options.references or ((recipe.data.healthy_class, data_uri),)
    for label, uri in wanted:
        set_features = _reference(run, label, uri, extractor, notes, options)
        if set_features is not None:
            references.append((f"{label} (reference)", set_features))
    several = len({row["prompt"] for row in rows}) > 1
    conditions = [(row["label"], row["prompt"] if several else None) for row in rows]
    found: list[Row | None] = []
    groups = recipe.evaluate.fid_subsets
    for label, prompt in sorted(set(conditions), key=str):
        chosen = [n for n, condition in enumerate(conditions) if condition == (label, prompt)]
        before, after = features.source[chosen], features.counterfactual[chosen]
        names = f"{label} (source)", f"{label} (counterfactual)" + ("" if prompt is None else f" under “{prompt}”")
        found.append(distance_row(*names, before, after, extractor, groups, paired=True))
        for name, reference in references:
            found.append(distance_row(name, names[0], reference, before, extractor, groups))
            found.append(distance_row(name, names[1], reference, after, extractor, groups))
    kept = [row for row in found if row is not None]
    if kept and min(min(row["n1"], row["n2"]) for row in kept) < 2048:
        notes.append("sets of fewer than 2048 films: read KID before the Fréchet distance, whose bias grows as 1/N")
    return kept


def _reference(run: Run, label: str, uri: str, extractor: Extractor, notes: list[str], options: Options) -> Any:
    """Features of a reference: class ``label`` of a data set, or the counterfactuals of another run's class."""
    other = open_run(open_store(uri)) if not uri.lower().endswith((".csv", ".parquet")) else None
    if other is not None:
        frame = read_records(other)
        rows = frame[(frame["status"] == Status.OK.value) & (frame["label"] == label)].to_dict("records")
        if not rows:
            raise UnusableData(f"--reference {label}={uri}: that run has no finished record of class {label}")
        return run_features(other, open_store(other.about["data_root"]), rows, extractor).counterfactual
    try:
        dataset = open_dataset(uri, run.recipe.data, [label])
    except UnusableData as error:
        if options.references:
            raise UnusableData(f"--reference {label}={uri}: {error}") from None
        notes.append(f"no reference set: {error}")
        return None
    cache = open_store(options.cache) if options.cache else run.store
    size = run.recipe.model.resolution
    features, unreadable = reference_features(cache, size, dataset.store, dataset.films, extractor, label)
    if unreadable:
        notes.append(f"{unreadable} films of reference {label} could not be read")
    return features


def reference_set(run: Run, label: str, uri: str, extractor: Extractor, cache: Store) -> Any:
    """Features [n, d] of class ``label`` of a data set (or of another run's counterfactuals), kept in ``cache``.

    Raises UnusableData when there is no such class.
    """
    return _reference(run, label, uri, extractor, [], Options(((label, uri),), cache=cache.uri))


def _write_quarantine(run: Run, quarantined: pd.DataFrame) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pandas(quarantined, schema=RECORDS, preserve_index=False), sink)
    run.store.put("quarantine.parquet", sink.getvalue())


def _write_manifest(run: Run) -> None:
    """Every file of the finished run with its size; sha256 besides for what no record vouches for."""
    files: dict[str, dict[str, Any]] = {}
    hashed = (PLAN_FILE, RUN, "quarantine.parquet", "records/", "tables/")
    for path, size in run.store.list():
        own = path.split("/", 2)[2] if path.startswith(f"{OVERLAYS}/") else path  # a retry is a run of its own
        if own.startswith(("report/", "figures/", "attempts/", "timings/")) or path in (MANIFEST, SUCCESS):
            continue
        files[path] = {"bytes": size}
        if own.startswith(hashed):
            files[path]["sha256"] = hashlib.sha256(run.store.read(path)).hexdigest()
    about = {"fingerprint": run.fingerprint, "shards": run.shards, "files": files}
    run.store.put(MANIFEST, json.dumps(about, indent=1).encode())
