"""The reduce step: verify the run, compute every table, and say with ``_SUCCESS`` that it is finished.

Works from the records and what the shards stored; tables do not depend on how many workers there were.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from diffva_ray._version import __version__
from diffva_ray.data.dataset import UnusableData
from diffva_ray.evaluate import tables
from diffva_ray.evaluate.annotations import THRESHOLDS_FILE, Zones, lesion_shapes, read_thresholds, read_zones
from diffva_ray.evaluate.baselines import Baselines, baselines_of, with_own
from diffva_ray.evaluate.credibility import problems
from diffva_ray.evaluate.executor import LocalExecutor
from diffva_ray.evaluate.factor_scores import factor_rows
from diffva_ray.evaluate.judge_quality import judge_quality
from diffva_ray.evaluate.options import Options, check_packages
from diffva_ray.evaluate.pair_scores import (
    add_controls,
    counterfactual_rows,
    external_rows,
    heart_rows,
    run_factors,
    run_judge,
    score_pairs,
    zone_rows,
)
from diffva_ray.evaluate.records import Lesions
from diffva_ray.evaluate.report.numbers import judge_tested
from diffva_ray.evaluate.report.result_tables import SPECS
from diffva_ray.evaluate.run_card import write_card
from diffva_ray.evaluate.run_index import SAMPLE, RunIndex, index_run
from diffva_ray.evaluate.scores import LocalizationScores, stacked
from diffva_ray.evaluate.set_distances import distances
from diffva_ray.evaluate.word_scores import word_rows
from diffva_ray.generate.committed import overlays
from diffva_ray.generate.data_identity import check_there
from diffva_ray.generate.failure_threshold import check_quarantined
from diffva_ray.generate.run import PLAN_FILE, SUCCESS, Run, remember_data
from diffva_ray.generate.run_json import OVERLAYS, RUN
from diffva_ray.generate.verification import MANIFEST, Problem, verify
from diffva_ray.metrics.pair_metrics import PAIR_METRICS
from diffva_ray.model.training_images import TrainingImages
from diffva_ray.schema import digest
from diffva_ray.storage.opening import open_file, open_store
from diffva_ray.storage.store import Store, join

if TYPE_CHECKING:
    from diffva_ray.metrics.external_judges import ExternalJudge
    from diffva_ray.metrics.perceptual import Lpips


METRICS, QUARANTINE = "tables/metrics.json", "quarantine.parquet"


class Incomplete(Exception):
    """Shards are missing or damaged; the message names their number and what to do."""

    def __init__(self, problems: list[Problem], uri: str) -> None:
        self.problems = problems
        shards = len({(problem.overlay, problem.shard) for problem in problems})
        repair = "" if all(problem.pending for problem in problems) else "diffva verify --repair, then "
        verb = "retry" if all(problem.overlay for problem in problems) else "generate"
        super().__init__(
            f"{uri}: {shards} shards are missing or damaged (first: {problems[0].what}); "
            f"run {repair}diffva {verb} again"
        )


class Notes(list[str]):
    """Notes on the tables, for the user."""

    all_read = True  # False: some images or masks could not be read, so the same reduce may do better later


@dataclass
class Reduced:
    """The result of a reduce."""

    metrics: dict[str, Any]  # the tables, as in tables/metrics.json
    notes: list[str] = field(default_factory=list)  # for the user
    fresh: bool = True  # False: the run was already reduced with these options, and nothing was written


def reduce_run(run: Run, data_uri: str, options: Options, executor: LocalExecutor | None = None) -> Reduced:
    """Write the tables, the quarantine list, the manifest and ``_SUCCESS`` of a run.

    Args:
        run: The run, with all its shards committed.
        data_uri: The data set, for lesion boxes and reference sets.
        options: The options of ``diffva reduce``.
        executor: Does the work on shards; None: this process.

    Returns:
        The tables, the notes, and whether anything was written: nothing is when the run was reduced like this before.

    Raises:
        Incomplete: Shards are missing or damaged.
        TooManyQuarantined: More records are quarantined than the recipe allows; tables are written, ``_SUCCESS`` not.
        UnusableData: An option or the data set cannot be used.
        StoreError: No sampled image of the data set can be read, or the store fails.
    """
    # anything to do?
    check_packages(options)
    damage = verify(run, pixels=False)
    if damage:
        raise Incomplete(damage, run.store.uri)
    state = _state(run, options)
    if (metrics := _earlier_metrics(run, {**state, "all_read": True, "tables": _tables(run)})) is not None:
        return Reduced(metrics, fresh=False)
    check_there(run.about, run.data)
    run.store.delete(SUCCESS)
    remember_data(run)

    # inputs
    notes = Notes()
    lesions = lesion_shapes(data_uri, run.recipe.data, options.boxes, notes)
    notes.all_read = not notes  # a note: the data set could not be opened
    zones = read_zones(options.brixia, run.plan(["image_path"])["image_path"].to_pylist()) if options.brixia else {}
    seen = TrainingImages.of_model(str(run.about.get("model", "")), run.keys["model_digest"])
    records = index_run(run, lesions, zones, seen.has if seen else None)
    if options.brixia and not records.requested:
        raise UnusableData(f"--brixia {options.brixia}: none of its files is an image of the run")

    # tables
    _write_quarantine(run, records.quarantined)
    metrics = _compute(run, data_uri, options, records, lesions, zones, executor or LocalExecutor(), notes)
    counts: dict[str, Any] = {
        "planned": run.about["records"], "ok": len(records.frame), "quarantined": len(records.quarantined)
    }  # fmt: skip
    if len(records.quarantined):
        counts["by_status"] = dict(Counter(records.quarantined["status"].to_pylist()).most_common())
    reduced = Reduced({"records": counts, **metrics, "notes": notes}, notes)
    run.store.put(METRICS, json.dumps(tables.clean(reduced.metrics), indent=1).encode())
    _write_manifest(run)
    write_card(run)

    check_quarantined(run, records.quarantined, reduced=True)
    written = {**state, "all_read": notes.all_read, "tables": _tables(run)}
    run.store.put(SUCCESS, json.dumps(written).encode())
    return reduced


def _earlier_metrics(run: Run, state: dict[str, Any]) -> dict[str, Any] | None:
    """The metrics of an earlier reduce if ``_SUCCESS`` holds the same ``state``; None otherwise, or if unreadable."""
    try:
        same = json.loads(run.store.read(SUCCESS)) == state
        return json.loads(run.store.read(METRICS)) if same else None
    except (OSError, ValueError):
        return None


def _state(run: Run, options: Options) -> dict[str, Any]:
    """Everything the tables depend on; ``_SUCCESS`` stores it, so an equal state means that they are up to date."""
    values = {key: value for key, value in options.__dict__.items() if key != "cache"}  # which changes no number
    files = [open_file(csv) for csv in (options.boxes, options.brixia, options.sources) if csv]
    if options.threshold_from:
        files.append((open_store(options.threshold_from), THRESHOLDS_FILE))
    contents = list[str | None]()
    for store, name in files:
        try:
            contents.append(hashlib.sha256(store.read(name)).hexdigest())
        except OSError:
            contents.append(None)  # the reader of the file raises the error that names the option
    return {
        "options": digest({**values, "contents": contents}), "fingerprint": run.fingerprint, "version": __version__,
        "data_root": run.about["data_root"], "parts": parts_digest(run),
        "pair_metrics": [metric.key for metric in PAIR_METRICS],
    }  # fmt: skip


def parts_digest(run: Run) -> str:
    """Digest of the names and sizes of all parts, including those of the retries."""
    folders = ["records", *(f"{OVERLAYS}/r{number}/records" for number, _ in enumerate(overlays(run), start=1))]
    return digest([run.store.list(folder) for folder in folders])


def _tables(run: Run) -> str:
    """Digest of the contents of all tables."""
    paths = [path for path, _ in run.store.list("tables")] + [QUARANTINE] * run.store.exists(QUARANTINE)
    return digest([(path, *_hashed(run.store, path)) for path in paths])


def _compute(
    run: Run, data_uri: str, options: Options, records: RunIndex, lesions: Lesions, zones: Zones,
    executor: LocalExecutor, notes: Notes,
) -> dict[str, Any]:  # fmt: skip
    # scores and features
    recipe = run.recipe
    baselines = baselines_of(run, data_uri, options, notes) if records.truth else None
    localization, ground_truth = _scores(run, records, lesions, baselines, executor)
    thresholds, source = None, None
    if options.threshold_from:
        stored, source = read_thresholds(options.threshold_from), options.threshold_from.rstrip("/").split("/")[-1]
        thresholds = with_own(stored, baselines)
    judges = _judges(options)
    lpips, unread = _lpips(options, recipe.model.resolution), set(localization.unread)
    factors = run_factors(run)
    pairs = score_pairs(run, records.sampled, lesions, run_judge(run), lpips, unread, factors)
    sets, within = distances(run, data_uri, options, records, notes, partial(executor.embed, run, options))
    # tables
    metrics: dict[str, Any] = {
        "fid": sets,
        "fid_within": within,
        "ssim": tables.ssim_rows(records.frame, recipe.generate.ssim_preset, recipe.model.resolution),
        "localization": tables.localization_rows(localization, thresholds, source),
        "validity": tables.validity_rows(records.frame),
        "external_validity": external_rows(run, records.sampled, lesions, judges),
        "ground_truth": tables.ground_truth_rows(ground_truth),
        "counterfactual": counterfactual_rows(pairs),
        "heart": heart_rows(pairs),
        "words": word_rows(pairs),
        "factors": factor_rows(pairs, factors, recipe.data.prompts, recipe.data.healthy_class),
        "brixia": zone_rows(run, records.requested, zones, unread),
    }
    if unread:
        notes.all_read = False
        notes.append(
            f"{len(unread)} images, or their masks or ground truth, cannot be read or have changed (first: "
            f"{join(run.data.uri, min(unread))}); they are left out of the tables that need them"
        )
    tables.add_lpips(metrics["ssim"], pairs)
    add_controls(metrics["validity"], pairs)
    trained_on = _count_training_images(records, metrics)
    quality = judge_quality(run) if metrics["validity"] else None
    found = problems(run, pairs, trained_on, len(records.frame))
    notes += [*found, *([f"{quality.problem}; its flip rates mean nothing"] if quality and quality.problem else [])]
    if "group" in records.frame:
        groups = records.frame["group"].nunique()
        notes.append(f"intervals are by patient: {groups} patients, {records.frame['image'].nunique()} images")
    if not len(localization.images):
        run.store.delete(THRESHOLDS_FILE)
    else:
        run.store.put(THRESHOLDS_FILE, json.dumps(tables.best_thresholds(localization), indent=1).encode())
    titles = "; ".join(metric.title for metric in PAIR_METRICS)
    values = {"size": recipe.model.resolution, "most": SAMPLE, "metrics": titles}
    values["tested"] = judge_tested(quality.as_dict() if quality else None)
    for name, table in metrics.items():
        tables.write_table(run.store, name, table, SPECS[name]["file_caption"].format_map(values))
    about = {"judge": quality.as_dict() if quality else None, "problems": found}
    return {name: content for name, content in {**metrics, **about}.items() if content}


def _scores(
    run: Run, records: RunIndex, lesions: Lesions, baselines: Baselines | None, executor: LocalExecutor
) -> tuple[LocalizationScores, pd.DataFrame]:
    """Localisation and ground truth scores of all images with known lesions, in plan order (intervals depend on it)."""
    shards_of = {shard_ref: records.ids[records.shards_of[shard_ref]] for shard_ref in records.truth}
    frames = list[pd.DataFrame]()

    def of_shards() -> Iterator[LocalizationScores]:
        for localization, ground_truth in executor.score(run, shards_of, lesions, baselines, records.settings):
            frames.append(ground_truth)
            yield localization

    localization = LocalizationScores.merged(of_shards())
    ground_truth = stacked(frames)
    if any(retry for retry, _ in shards_of):  # retried records come last: sort them into the plan
        order = np.argsort(records.ids)
        localization.images, ground_truth = (
            _in_order(frame, records.ids, order) for frame in (localization.images, ground_truth)
        )
    return localization, ground_truth


def _in_order(frame: pd.DataFrame, ids: NDArray[np.bytes_], order: NDArray[np.intp]) -> pd.DataFrame:
    if not len(frame):
        return frame
    positions = order[np.searchsorted(ids, frame["record_id"].to_numpy().astype("S20"), sorter=order)]
    return frame.iloc[np.argsort(positions, kind="stable")]


def _lpips(options: Options, size: int) -> Lpips | None:
    """LPIPS if requested. Raises UnusableData, one line, when it cannot be computed."""
    if options.lpips is None:
        return None
    from diffva_ray.metrics.perceptual import lpips  # loads torch

    if size < 32:
        raise UnusableData(f"--lpips-weights: images of {size} px are too small for LPIPS, which needs 32")
    try:
        return lpips(options.lpips)
    except ValueError as error:
        raise UnusableData(f"--lpips-weights: {error}") from None


def _judges(options: Options) -> list[ExternalJudge]:
    """The requested published judges. Raises UnusableData, one line, for one that cannot be loaded."""
    if not options.judges:
        return []
    from diffva_ray.metrics.external_judges import open_judges  # loads torch

    try:
        return open_judges(options.judges)
    except ValueError as error:
        raise UnusableData(str(error)) from None


def _count_training_images(records: RunIndex, metrics: dict[str, Any]) -> int:
    """The number of records with images that the model was trained on; if any, also added to the table rows."""
    frame = records.frame
    if "trained_on" not in frame or not frame["trained_on"].any():
        return 0
    counts = {label: int(rows["trained_on"].sum()) for label, rows in tables.by_label(frame)}
    for row in (row for name in ("localization", "validity", "ground_truth") for row in metrics[name]):
        row["training_images"] = counts[row["label"]]
    return int(frame["trained_on"].sum())


def _write_quarantine(run: Run, quarantined: pa.Table) -> None:
    sink = io.BytesIO()
    pq.write_table(quarantined.cast(run.records_schema), sink)
    run.store.put(QUARANTINE, sink.getvalue())


def _write_manifest(run: Run) -> None:
    """Write the sizes and sha256 of plan, run.json, records and tables, and the sizes of the features.

    Images are left out, because their digests are in the records and there may be ten million of them."""
    files: dict[str, dict[str, Any]] = {}
    for folder in ("", *(f"{OVERLAYS}/r{number}/" for number, _ in enumerate(overlays(run), start=1))):
        named = [f"{folder}{name}" for name in (PLAN_FILE, RUN, QUARANTINE)]
        paths = [path for path in named if run.store.exists(path)]
        paths += [path for kind in ("records", "tables") for path, _ in run.store.list(f"{folder}{kind}")]
        with ThreadPoolExecutor(8) as pool:
            for path, (size, sha256) in zip(paths, pool.map(partial(_hashed, run.store), paths), strict=True):
                files[path] = {"bytes": size, "sha256": sha256}
        files |= {path: {"bytes": size} for path, size in run.store.list(f"{folder}features")}
    manifest = {"fingerprint": run.fingerprint, "shards": run.shards, "files": files}
    run.store.put(MANIFEST, json.dumps(manifest, indent=1).encode())


def _hashed(store: Store, path: str) -> tuple[int, str]:
    data = store.read(path)
    return len(data), hashlib.sha256(data).hexdigest()
