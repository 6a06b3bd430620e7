"""Compares two runs image by image: the metrics of both, and whether their difference is more than chance.

Records are joined by image path, label and sample; only images in both runs are used. Intervals come from a paired
bootstrap, which resamples the same images for both runs, so that differences between images cancel.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from diffva_ray.config.recipe import fingerprint_difference
from diffva_ray.data.dataset import UnusableData
from diffva_ray.evaluate import tables
from diffva_ray.evaluate.annotations import lesion_shapes
from diffva_ray.evaluate.credibility import stated
from diffva_ray.evaluate.judge_quality import judge_quality
from diffva_ray.evaluate.records import as_records, by_shard, finished, read_records, reduced_metrics
from diffva_ray.evaluate.report.numbers import judge_tested
from diffva_ray.evaluate.scores import score_records
from diffva_ray.generate.run import Run
from diffva_ray.metrics.intervals import paired_difference
from diffva_ray.metrics.localization import dice_at
from diffva_ray.schema import Record, TableRow

JOINED_BY = ["image_path", "label", "sample"]  # columns by which the records of two runs are joined


@dataclass(frozen=True)
class ComparedMetric:
    """One metric of an image in a comparison."""

    key: str  # column name
    title: str
    better: int  # 1: more is better, -1: less is better, 0: neither
    form: str = "number"  # or "percent"
    name: str = ""  # a short title


COMPARED_METRICS = (
    ComparedMetric("auroc", "AUROC of max(M, 0)", 1, name="AUROC"),
    ComparedMetric("auprc", "AUPRC of max(M, 0)", 1),
    ComparedMetric("dice_fixed", "Dice at each run’s fixed threshold", 1, name="Dice at fixed threshold"),
    ComparedMetric("dice_best", "Dice at each image’s best threshold", 1),
    ComparedMetric("pointing_game", "pointing game", 1),
    ComparedMetric("flip_rate", "flip rate", 1, "percent"),
    ComparedMetric("confidence_gain", "judge’s confidence gain", 1),
    ComparedMetric("lesion_error_ratio", "lesion error left", -1, "percent"),
    ComparedMetric("ground_truth_psnr", "PSNR to ground-truth counterfactual, dB", 1),
    ComparedMetric("ground_truth_ssim", "SSIM to ground-truth counterfactual", 1),
    ComparedMetric("ssim", "SSIM, image and counterfactual", 0, name="SSIM"),
    ComparedMetric("ms_ssim", "MS-SSIM, image and counterfactual", 0),
    ComparedMetric("l1", "mean |image − counterfactual|", 0),
    ComparedMetric("attribution_energy", "map energy, mean |M|", 0, name="map energy"),
    ComparedMetric("attribution_energy_lung_fraction", "map energy inside the lungs", 0, "percent"),
)
BY_KEY = {measure.key: measure for measure in COMPARED_METRICS}
RECORDED = ("ssim", "ms_ssim", "l1", "attribution_energy", "attribution_energy_lung_fraction")  # columns of the records
LOCALIZED = ("auroc", "auprc", "dice_best", "pointing_game")  # columns of a localisation row


@dataclass
class Comparison:
    """The result of comparing two runs."""

    a: Run
    b: Run
    names: tuple[str, str]  # short names of the runs
    # one row per image in both runs: ``<measure>_a`` and ``<measure>_b``, the weights of ratios as ``<measure>_of_a``
    # and ``<measure>_of_b``, and the records as ``record_a`` and ``record_b``
    pairs: pd.DataFrame
    rows: list[TableRow]  # one per measure and class, as ``difference_rows`` returns them
    settings: list[tuple[str, Any, Any]]  # the settings that differ: (name, in A, in B)
    counts: dict[str, int]  # images: pairs, only_in_a, only_in_b, same_name_other_bytes
    swept: list[str] = field(default_factory=list)  # settings that both runs sweep; records are also joined by them
    notes: list[str] = field(default_factory=list)  # for the user

    def row(self, key: str) -> TableRow | None:
        """The row of a measure over all classes, or of the only class."""
        return tables.overall(row for row in self.rows if row["measure"] == key)

    def metrics(self) -> dict[str, Any]:
        """The content of ``metrics.json``."""
        settings = [{"setting": name, "a": in_a, "b": in_b} for name, in_a, in_b in self.settings]
        return {
            "a": {"run": self.a.store.uri, "fingerprint": self.a.fingerprint},
            "b": {"run": self.b.store.uri, "fingerprint": self.b.fingerprint},
            "images": self.counts,
            "settings": settings,
            "differences": self.rows,
            "notes": self.notes,
        }


def compare_runs(a: Run, b: Run) -> Comparison:
    """Compare two runs on the images that both have; differences are B - A, nothing is written. Raises UnusableData if
    there is no such image, or if one run has several records of one image."""
    # join the records
    notes: list[str] = []
    frames = [finished(read_records(run)) for run in (a, b)]
    swept = [str(key) for key, _ in a.keys["sweep"] if key in dict(b.keys["sweep"])]
    on = JOINED_BY + swept
    for run, frame in zip((a, b), frames):
        if frame.duplicated(on).any():
            alone = ", ".join(str(key) for key, _ in run.keys["sweep"] if key not in swept)
            raise UnusableData(
                f"{run.store.uri} alone sweeps {alone}, so it has several records of one image; compare one point"
            )
    joined = frames[0].merge(frames[1], on=on, suffixes=("_a", "_b"), how="inner").sort_values(on)
    # leave out images with different bytes
    other = joined["image_sha256_a"].notna() & joined["image_sha256_b"].notna()
    other &= joined["image_sha256_a"] != joined["image_sha256_b"]
    counts = {
        "pairs": int((~other).sum()),
        "only_in_a": len(frames[0]) - len(joined),
        "only_in_b": len(frames[1]) - len(joined),
        "same_name_other_bytes": int(other.sum()),
    }
    joined = joined[~other]
    if joined.empty:
        reason = f"; {counts['same_name_other_bytes']} have the same name but other bytes" if other.any() else ""
        raise UnusableData(f"{a.store.uri} and {b.store.uri} have no finished image in common{reason}")
    # metrics of both runs
    pairs = joined[on].reset_index(drop=True)
    for side, frame in zip("ab", frames):
        ids = joined["record_id_a" if side == "a" else "record_id_b"].tolist()
        rows = {row["record_id"]: row for row in as_records(frame[frame["record_id"].isin(ids)])}
        pairs[f"record_{side}"] = [rows[name] for name in ids]
    _fill(pairs, a, b, notes)
    notes += _cautions(a, b, pairs)
    names = run_names(a.store.uri, b.store.uri)
    settings = differing_settings(a, b)
    return Comparison(a, b, names, pairs, difference_rows(pairs), settings, counts, swept, notes)


def run_names(a: str, b: str) -> tuple[str, str]:
    """Short names of two runs: their folder names, with as many parent folders as needed to differ."""
    parts_a, parts_b = a.rstrip("/").split("/"), b.rstrip("/").split("/")
    for length in range(1, max(len(parts_a), len(parts_b))):
        name_a, name_b = "/".join(parts_a[-length:]), "/".join(parts_b[-length:])
        if name_a != name_b:
            return name_a, name_b
    return parts_a[-1], parts_b[-1]


def _fill(pairs: pd.DataFrame, a: Run, b: Run, notes: list[str]) -> None:
    """Add to ``pairs`` the columns of every measure that both runs have."""
    sides = {"a": _image_numbers(a, pairs["record_a"].tolist(), notes)}
    sides["b"] = _image_numbers(b, pairs["record_b"].tolist(), notes) if b is not a else sides["a"]
    for measure in COMPARED_METRICS:
        key = measure.key
        if any(key not in numbers or numbers[key].isna().all() for numbers in sides.values()):
            continue
        for side, numbers in sides.items():
            pairs[f"{key}_{side}"] = numbers[key]
            if f"{key}_of" in numbers:
                pairs[f"{key}_of_{side}"] = numbers[f"{key}_of"]
    if "ms_ssim_a" in pairs and not (sides["a"]["ms_ssim_scales"] == sides["b"]["ms_ssim_scales"]).all():
        pairs.drop(columns=["ms_ssim_a", "ms_ssim_b"], inplace=True)
        notes.append("MS-SSIM is left out: the runs' resolutions allow different numbers of scales")
    if "auroc_a" in pairs and (missing := int((pairs["auroc_a"].isna() | pairs["auroc_b"].isna()).sum())):
        notes.append(f"{missing} images have no localisation in one run or both (no lesion known, or nothing to find)")


def _image_numbers(run: Run, records: list[Record], notes: list[str]) -> pd.DataFrame:
    """The measures of ``records`` of one run, in their order; NaN for unknown ones."""
    # from the records
    frame = pd.DataFrame(records)
    numbers = frame[[*RECORDED, "ms_ssim_scales"]].apply(pd.to_numeric)
    before, after = (pd.to_numeric(frame[f"judge_{which}"]) for which in ("image", "counterfactual"))
    numbers["flip_rate"] = (after > 0.5).astype(float).where(before <= 0.5)
    numbers["confidence_gain"] = after - before
    # from the images and their ground truth
    messages: list[str] = []
    lesions = lesion_shapes(run.about["data"], run.recipe.data, None, messages)
    notes += [note for note in messages if note not in notes]
    with ThreadPoolExecutor(8) as pool:  # waits on the store, mostly
        scored = list(pool.map(lambda rows: score_records(run, rows, lesions), by_shard(records).values()))
    localization = {row["record_id"]: row for rows, _ in scored for row in rows if row["map"] == "positive"}
    ground_truth = {row["record_id"]: row for _, rows in scored for row in rows}
    threshold = fixed_threshold_of(run)

    def column(rows: dict[str, TableRow], key: str) -> list[float]:
        return [rows[name][key] if name in rows else math.nan for name in frame["record_id"]]

    for key in LOCALIZED:
        numbers[key] = column(localization, key)
    if threshold is not None and localization:
        dices = dice_at(np.stack([row["dice_curve"] for row in localization.values()]), threshold)
        fixed = {name: {"dice": float(dice)} for name, dice in zip(localization, dices)}
        numbers["dice_fixed"] = column(fixed, "dice")
    numbers["lesion_error_ratio"] = column(ground_truth, "lesion_error")
    numbers["lesion_error_ratio_of"] = column(ground_truth, "lesion_error_input")
    numbers["ground_truth_psnr"] = column(ground_truth, "psnr")
    numbers["ground_truth_ssim"] = column(ground_truth, "ssim")
    return numbers.replace([np.inf, -np.inf], np.nan)  # PSNR of equal images is infinite


def fixed_threshold_of(run: Run) -> float | None:
    """The threshold of max(M, 0) in the run's tables, which was fixed on other images; None without one."""
    for row in (reduced_metrics(run) or {}).get("localization", []):
        if row["map"] == "positive" and row.get("threshold") is not None:
            return float(row["threshold"])
    return None


def difference_rows(pairs: pd.DataFrame) -> list[TableRow]:
    """One row per class and measure: value of A, of B, and B - A with its 95 % interval; all classes come last."""
    rows = []
    for label, images in tables.by_label(pairs):
        for measure in COMPARED_METRICS:
            if f"{measure.key}_a" not in images:
                continue
            values = [images[f"{measure.key}_{side}"].to_numpy(float) for side in "ab"]
            weights = [
                images.get(f"{measure.key}_of_{side}", pd.Series(1.0, images.index)).to_numpy(float) for side in "ab"
            ]
            finite = np.isfinite(np.stack([*values, *weights])).all(axis=0)
            if not finite.any():
                continue
            patients = images["record_a"].map(lambda record: record["patient"] or record["image_path"])
            groups = patients[finite].tolist()
            above, below = (np.stack([side[finite] for side in sides], axis=1) for sides in (values, weights))
            in_a, in_b, interval = paired_difference(above, below, groups)
            rows.append(
                {
                    "measure": measure.key,
                    "label": label,
                    "n": int(finite.sum()),
                    "a": in_a,
                    "b": in_b,
                    "difference": in_b - in_a,
                    "interval": list(interval),
                    "better": _better_run(measure, interval),
                }
            )
    return rows


def _better_run(measure: ComparedMetric, interval: tuple[float, float]) -> str | None:
    """``a`` or ``b`` if the interval excludes zero and the measure has a better direction; else None."""
    low, high = interval
    if not measure.better or not (low > 0 or high < 0):
        return None
    return "b" if (low > 0) == (measure.better > 0) else "a"


def differing_settings(a: Run, b: Run) -> list[tuple[str, Any, Any]]:
    """(name, in A, in B) of each difference in fingerprint keys, attribution kind, recipe, version and code."""
    keys = a.keys, b.keys
    different = [(key, keys[0].get(key), keys[1].get(key)) for key in fingerprint_difference(*keys)]
    if a.recipe.generate.map_name != b.recipe.generate.map_name:
        different.append(("map", a.recipe.generate.map_name, b.recipe.generate.map_name))
    if a.recipe.name != b.recipe.name:
        different.append(("recipe", a.recipe.name, b.recipe.name))
    for key in ("diffva_ray", "code_revision"):
        if a.about.get(key) != b.about.get(key):
            different.append((key, a.about.get(key), b.about.get(key)))
    return different


def _cautions(a: Run, b: Run, pairs: pd.DataFrame) -> list[str]:
    """Notes on what makes the two runs less comparable."""
    notes = []
    keys = a.keys, b.keys
    if keys[0]["resolution"] != keys[1]["resolution"]:
        notes.append("the runs have different resolutions: every number is on its run's own pixel grid")
    before = [pd.Series([row["judge_image"] for row in pairs[f"record_{side}"]], dtype=float) for side in "ab"]
    if (
        before[0].notna().any()
        and before[1].notna().any()
        and not np.allclose(before[0], before[1], atol=1e-3, equal_nan=True)
    ):
        notes.append("the runs have different judges: flip rates are of the images that both call abnormal")
    for name, run in zip("AB", (a, b)):
        notes += [f"{name}: {problem}" for problem in stated(run, reduced_metrics(run))]
        if before[0].notna().any() and (quality := judge_quality(run)) is not None:
            tested = judge_tested(quality.as_dict())
            notes.append(f"{name}: {quality.problem or f'the judge was {tested}'}")
        if run.pending():
            notes.append(f"{name} is unfinished: {len(run.pending())} of {run.shards} shards are pending")
    thresholds = fixed_threshold_of(a), fixed_threshold_of(b)
    if "auroc_a" in pairs and None in thresholds:
        notes.append("no Dice at a fixed threshold: reduce both runs with --threshold-from a validation run")
    return notes


def setting_text(value: Any) -> str:
    """A setting as text: a dash for None, ``(empty)`` for an empty string, digests shortened."""
    if value is None:
        return "–"
    text = str(value)
    if not text:
        return "(empty)"
    return text[:12] if len(text) == 64 and all(letter in "0123456789abcdef" for letter in text) else text
