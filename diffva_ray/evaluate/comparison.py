"""Two runs on the same images: every number of both, image by image, and whether the difference is more than chance.

Images are joined by path, label and sample; only images that both runs have count. Intervals come from a paired
bootstrap: the same images are drawn anew for both runs, so what makes an image hard for both cancels.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from diffva_ray.config.recipe import fingerprint_difference
from diffva_ray.data.dataset import UnusableData
from diffva_ray.evaluate import tables
from diffva_ray.evaluate.annotations import lesion_boxes
from diffva_ray.evaluate.records import by_shard, finished, read_records, reduced_metrics
from diffva_ray.evaluate.scores import score_records
from diffva_ray.evaluate.summary import terminal
from diffva_ray.generate.run import Run
from diffva_ray.metrics.localization import dice_at
from diffva_ray.schema import Row

JOINED_BY = ["image_path", "label", "sample"]  # what makes records of two runs a pair
DRAWS = 1000


@dataclass(frozen=True)
class Measure:
    """One number of an image. ``better``: 1 more is better, -1 less is, 0 neither; ``form``: number or percent;
    ``name``: a short title."""

    key: str
    title: str
    better: int
    form: str = "number"
    name: str = ""


MEASURES = (
    Measure("auroc", "AUROC of max(M, 0)", 1, name="AUROC"),
    Measure("auprc", "AUPRC of max(M, 0)", 1),
    Measure("dice_fixed", "Dice at each run’s fixed threshold", 1, name="Dice at fixed threshold"),
    Measure("dice_best", "Dice at each image’s best threshold", 1),
    Measure("pointing_game", "pointing game", 1),
    Measure("flip_rate", "flip rate", 1, "percent"),
    Measure("confidence_gain", "judge’s confidence gain", 1),
    Measure("lesion_error_ratio", "lesion error left", -1, "percent"),
    Measure("ground_truth_psnr", "PSNR to ground-truth counterfactual, dB", 1),
    Measure("ground_truth_ssim", "SSIM to ground-truth counterfactual", 1),
    Measure("ssim", "SSIM, image and counterfactual", 0, name="SSIM"),
    Measure("ms_ssim", "MS-SSIM, image and counterfactual", 0),
    Measure("l1", "mean |image − counterfactual|", 0),
    Measure("attribution_energy", "map energy, mean |M|", 0, name="map energy"),
    Measure("attribution_energy_lung_fraction", "map energy inside the lungs", 0, "percent"),
)
BY_KEY = {measure.key: measure for measure in MEASURES}
RECORDED = ("ssim", "ms_ssim", "l1", "attribution_energy", "attribution_energy_lung_fraction")  # columns of the records
PLACED = ("auroc", "auprc", "dice_best", "pointing_game")  # of a localisation row


@dataclass
class Comparison:
    """``pairs``: one row per image that both runs have, with columns ``<measure>_a`` and ``<measure>_b``, weights of
    ratios as ``<measure>_of_a`` and ``_of_b``, and the records as ``record_a`` and ``record_b``. ``rows``: one per
    measure and class. ``settings``: (name, in A, in B) of what differs. ``swept``: settings that both runs sweep, by
    which their records are joined besides."""

    a: Run
    b: Run
    names: tuple[str, str]
    pairs: pd.DataFrame
    rows: list[Row]
    settings: list[tuple[str, Any, Any]]
    counts: dict[str, int]
    swept: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def row(self, key: str) -> Row | None:
        """The row of a measure over all classes, or of the only one."""
        return tables.overall(row for row in self.rows if row["measure"] == key)

    def metrics(self) -> dict[str, Any]:
        """What ``metrics.json`` holds."""
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
    """Compare two runs; nothing is written. Raises UnusableData, one line, when they have no image in common or a run
    has several records of one image."""
    notes: list[str] = []
    frames = [finished(read_records(run)) for run in (a, b)]
    swept = [str(key) for key, _ in a.keys["sweep"] if key in dict(b.keys["sweep"])]
    on = JOINED_BY + swept
    for run, frame in zip((a, b), frames):
        if frame.duplicated(on).any():
            alone = ", ".join(str(key) for key, _ in run.keys["sweep"] if key not in swept)
            raise UnusableData(
                f"{run.store.uri} alone sweeps {alone}: it has several records of one image; compare one point"
            )
    joined = frames[0].merge(frames[1], on=on, suffixes=("_a", "_b"), how="inner").sort_values(on)
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
        why = f"; {counts['same_name_other_bytes']} have one name and other bytes" if other.any() else ""
        raise UnusableData(f"{a.store.uri} and {b.store.uri} have no finished image in common{why}")
    pairs = joined[on].reset_index(drop=True)
    for side, frame in zip("ab", frames):
        ids = joined["record_id_a" if side == "a" else "record_id_b"].tolist()
        rows = {row["record_id"]: row for row in frame[frame["record_id"].isin(ids)].to_dict("records")}
        pairs[f"record_{side}"] = [rows[name] for name in ids]
    _fill(pairs, a, b, notes)
    notes += _cautions(a, b, pairs)
    names = run_names(a.store.uri, b.store.uri)
    settings = differing_settings(a, b)
    return Comparison(a, b, names, pairs, difference_rows(pairs), settings, counts, swept, notes)


def run_names(a: str, b: str) -> tuple[str, str]:
    """What two runs are called: their folders' names, with as many folders above as tell them apart."""
    parts_a, parts_b = a.rstrip("/").split("/"), b.rstrip("/").split("/")
    for length in range(1, max(len(parts_a), len(parts_b))):
        one, two = "/".join(parts_a[-length:]), "/".join(parts_b[-length:])
        if one != two:
            return one, two
    return parts_a[-1], parts_b[-1]


def _fill(pairs: pd.DataFrame, a: Run, b: Run, notes: list[str]) -> None:
    """Add the columns of every measure that both runs have."""
    sides = {"a": _image_numbers(a, pairs["record_a"].tolist(), notes)}
    sides["b"] = _image_numbers(b, pairs["record_b"].tolist(), notes) if b is not a else sides["a"]
    for measure in MEASURES:
        key = measure.key
        if any(key not in numbers or numbers[key].isna().all() for numbers in sides.values()):
            continue
        for side, numbers in sides.items():
            pairs[f"{key}_{side}"] = numbers[key]
            if f"{key}_of" in numbers:
                pairs[f"{key}_of_{side}"] = numbers[f"{key}_of"]
    if "ms_ssim_a" in pairs and not (sides["a"]["ms_ssim_scales"] == sides["b"]["ms_ssim_scales"]).all():
        pairs.drop(columns=["ms_ssim_a", "ms_ssim_b"], inplace=True)
        notes.append("MS-SSIM is left out: the runs' grids allow another number of scales")
    if "auroc_a" in pairs and (unplaced := int((pairs["auroc_a"].isna() | pairs["auroc_b"].isna()).sum())):
        notes.append(f"{unplaced} images have no localisation in one run or both (no lesion known, or nothing to find)")


def _image_numbers(run: Run, records: list[Row], notes: list[str]) -> pd.DataFrame:
    """The numbers of one run, a row per record of ``records``, in their order; NaN where an image has none."""
    frame = pd.DataFrame(records)
    found = frame[[*RECORDED, "ms_ssim_scales"]].apply(pd.to_numeric)
    before, after = (pd.to_numeric(frame[f"judge_{which}"]) for which in ("image", "counterfactual"))
    found["flip_rate"] = (after > 0.5).astype(float).where(before <= 0.5)
    found["confidence_gain"] = after - before
    said: list[str] = []
    boxes = lesion_boxes(run.about["data"], None, said)
    notes += [note for note in said if note not in notes]
    with ThreadPoolExecutor(8) as pool:  # waits on the store, mostly
        scored = list(pool.map(lambda rows: score_records(run, rows, boxes), by_shard(records).values()))
    localization = {row["record_id"]: row for found_here, _ in scored for row in found_here if row["map"] == "positive"}
    counterfactuals = {row["record_id"]: row for _, found_here in scored for row in found_here}
    threshold = fixed_threshold_of(run)

    def column(rows: dict[str, Row], key: str) -> list[float]:
        return [rows[name][key] if name in rows else math.nan for name in frame["record_id"]]

    for key in PLACED:
        found[key] = column(localization, key)
    if threshold is not None and localization:
        at = dice_at(np.stack([row["dice_curve"] for row in localization.values()]), threshold)
        fixed = {name: {"dice": float(dice)} for name, dice in zip(localization, at)}
        found["dice_fixed"] = column(fixed, "dice")
    found["lesion_error_ratio"] = column(counterfactuals, "lesion_error")
    found["lesion_error_ratio_of"] = column(counterfactuals, "lesion_error_input")
    found["ground_truth_psnr"], found["ground_truth_ssim"] = (
        column(counterfactuals, "psnr"),
        column(counterfactuals, "ssim"),
    )
    return found.replace([np.inf, -np.inf], np.nan)  # PSNR of equal pictures


def fixed_threshold_of(run: Run) -> float | None:
    """The threshold of max(M, 0) that the run's own tables used, fixed on other images; None when there was none."""
    for row in (reduced_metrics(run) or {}).get("localization", []):
        if row["map"] == "positive" and row.get("threshold") is not None:
            return float(row["threshold"])
    return None


def difference_rows(pairs: pd.DataFrame) -> list[Row]:
    """One row per class and measure: value of A, of B, and B - A with its 95 % interval; classes first, then all."""
    found = []
    for label, images in tables.by_label(pairs):
        for measure in MEASURES:
            if f"{measure.key}_a" not in images:
                continue
            values = [images[f"{measure.key}_{side}"].to_numpy(float) for side in "ab"]
            weights = [
                images.get(f"{measure.key}_of_{side}", pd.Series(1.0, images.index)).to_numpy(float) for side in "ab"
            ]
            known = np.isfinite(np.stack([*values, *weights])).all(axis=0)
            if not known.any():
                continue
            paths = images.loc[known, "image_path"].tolist()
            above, below = (np.stack([part[known] for part in parts], axis=1) for parts in (values, weights))
            in_a, in_b, interval = paired_difference(above, below, paths)
            found.append(
                {
                    "measure": measure.key,
                    "label": label,
                    "n": int(known.sum()),
                    "a": in_a,
                    "b": in_b,
                    "difference": in_b - in_a,
                    "interval": list(interval),
                    "better": _verdict(measure, interval),
                }
            )
    return found


def _verdict(measure: Measure, interval: tuple[float, float]) -> str | None:
    """``a`` or ``b`` where the interval leaves no doubt and more or less is better; else None."""
    low, high = interval
    if not measure.better or not (low > 0 or high < 0):
        return None
    return "b" if (low > 0) == (measure.better > 0) else "a"


def paired_difference(
    values: NDArray[np.float64], weights: NDArray[np.float64], groups: Sequence[Hashable], draws: int = DRAWS
) -> tuple[float, float, tuple[float, float]]:
    """Ratio of sums of ``values`` over ``weights`` [N, 2] for A and for B (weights of 1 make it a mean), and the 95 %
    percentile interval of B - A, drawing whole ``groups`` (images) anew, the same ones for both.

    The interval is (nan, nan) for fewer than two groups. Raises ValueError for shapes that differ.
    """
    if values.shape != weights.shape or values.shape != (len(groups), 2):
        raise ValueError(
            f"values and weights are [N, 2] with N groups, got {values.shape}, {weights.shape}, {len(groups)}"
        )
    names: dict[Hashable, int] = {}
    index = np.array([names.setdefault(group, len(names)) for group in groups], dtype=np.intp)
    sums = np.zeros((len(names), 4))
    np.add.at(sums, index, np.concatenate([values, weights], axis=1))

    def ratios(totals: NDArray[np.float64]) -> NDArray[np.float64]:
        return totals[..., :2] / np.maximum(totals[..., 2:], 1e-12)

    in_a, in_b = ratios(sums.sum(axis=0))
    if len(sums) < 2:
        return float(in_a), float(in_b), (math.nan, math.nan)
    random = np.random.default_rng(0)
    drawn = np.stack([sums[random.integers(len(sums), size=len(sums))].sum(axis=0) for _ in range(draws)])
    found = ratios(drawn)
    low, high = np.percentile(found[:, 1] - found[:, 0], [2.5, 97.5])
    return float(in_a), float(in_b), (float(low), float(high))


def differing_settings(a: Run, b: Run) -> list[tuple[str, Any, Any]]:
    """(name, in A, in B) of the keys of the two fingerprints that differ, and of recipe and code where they do."""
    keys = a.keys, b.keys
    found = [(key, keys[0].get(key), keys[1].get(key)) for key in fingerprint_difference(*keys)]
    if a.recipe.generate.map_name != b.recipe.generate.map_name:
        found.append(("map", a.recipe.generate.map_name, b.recipe.generate.map_name))
    if a.recipe.name != b.recipe.name:
        found.append(("recipe", a.recipe.name, b.recipe.name))
    for key in ("diffva_ray", "code_revision"):
        if a.about.get(key) != b.about.get(key):
            found.append((key, a.about.get(key), b.about.get(key)))
    return found


def _cautions(a: Run, b: Run, pairs: pd.DataFrame) -> list[str]:
    """What makes the two runs less comparable than their table looks."""
    said = []
    keys = a.keys, b.keys
    if keys[0]["resolution"] != keys[1]["resolution"]:
        said.append("the runs have other resolutions: every number is on its run's own pixel grid")
    before = [pd.Series([row["judge_image"] for row in pairs[f"record_{side}"]], dtype=float) for side in "ab"]
    if (
        before[0].notna().any()
        and before[1].notna().any()
        and not np.allclose(before[0], before[1], atol=1e-3, equal_nan=True)
    ):
        said.append("the runs have judges of their own: flip rates are of the images that both call abnormal")
    for name, run in zip("AB", (a, b)):
        if run.pending():
            said.append(f"{name} is unfinished: {len(run.pending())} of {run.shards} shards are pending")
    thresholds = fixed_threshold_of(a), fixed_threshold_of(b)
    if "auroc_a" in pairs and None in thresholds:
        said.append("no Dice at a fixed threshold: reduce both runs with --threshold-from a validation run")
    return said


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """The numbers over all classes, the settings that differ, the counts and what has to be said."""
    console = console or terminal()
    names = [escape(name) for name in comparison.names]
    console.print(f"A  {escape(comparison.a.store.uri)}\nB  {escape(comparison.b.store.uri)}", highlight=False)
    if comparison.settings:
        settings = Table(title="SamplingSettings that differ", title_justify="left", header_style="bold")
        for head in ("setting", f"A {names[0]}", f"B {names[1]}"):
            settings.add_column(head)
        for name, *values in comparison.settings:
            settings.add_row(name, *(escape(shown(value)) for value in values))
        console.print(settings)
    else:
        console.print("the two runs have the same settings")
    label = comparison.rows[-1]["label"]
    table = Table(title=f"Difference, class {escape(label)}", title_justify="left", header_style="bold")
    table.add_column("")
    for head in ("n", f"A {names[0]}", f"B {names[1]}", "B − A", "95% interval", "better"):
        table.add_column(head, justify="right")
    for row in comparison.rows:
        if row["label"] == label:
            low, high = row["interval"]
            table.add_row(
                BY_KEY[row["measure"]].title, str(row["n"]), f"{row['a']:.4g}", f"{row['b']:.4g}",
                f"{row['difference']:+.4f}", "" if math.isnan(low) else f"{low:+.4f} to {high:+.4f}",
                (row["better"] or "").upper(),
            )  # fmt: skip
    console.print(table)
    counts = comparison.counts
    console.print(
        f"{counts['pairs']} images in both runs, {counts['only_in_a']} in A only, {counts['only_in_b']} in B only"
        + (f", {counts['same_name_other_bytes']} with one name and other bytes (left out)"
           if counts["same_name_other_bytes"] else ""), highlight=False,
    )  # fmt: skip
    for note in comparison.notes:
        console.print(f"note: {note}", markup=False, highlight=False)


def shown(value: Any) -> str:
    """A setting for people: nothing is a dash, an empty text is said, digests are short."""
    if value is None:
        return "–"
    text = str(value)
    if not text:
        return "(empty)"
    return text[:12] if len(text) == 64 and all(sign in "0123456789abcdef" for sign in text) else text
