"""Makes tables from scores: rows by class, written as CSV, Markdown, LaTeX and JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from diffva_ray.evaluate.annotations import of_finding
from diffva_ray.evaluate.records import under
from diffva_ray.evaluate.scores import SIMPLE, LocalizationScores
from diffva_ray.metrics.baselines import BASELINES, WITH_PRIOR
from diffva_ray.metrics.counterfactual import flip_rate
from diffva_ray.metrics.intervals import group_bootstrap, proportion_interval
from diffva_ray.metrics.localization import SALIENCY, dice_at, fixed_threshold
from diffva_ray.progress import one_line
from diffva_ray.schema import TableRow
from diffva_ray.storage.store import Store

OURS = (*SALIENCY, WITH_PRIOR)  # names of maps of the method itself
ALL = "all"  # the row over all classes


def by_label(frame: pd.DataFrame) -> Iterable[tuple[str, pd.DataFrame]]:
    """Yields (class, rows) for each class, then for all classes; settings of a sweep (``setting``) stay separate."""
    settings = list(frame["setting"].unique()) if "setting" in frame else [""]
    for setting in settings:
        rows = frame[frame["setting"] == setting] if setting else frame
        labels = sorted(rows["label"].unique())
        for label in labels:
            yield under(label, setting), rows[rows["label"] == label]
        if len(labels) > 1:
            yield under(ALL, setting), rows


def overall(rows: Iterable[TableRow]) -> TableRow | None:
    """The row over all classes, or the only row; None for a sweep, whose settings are never pooled."""
    listed = list(rows)
    return next((row for row in listed if row["label"] == ALL), listed[0] if len(listed) == 1 else None)


def known(value: Any) -> bool:
    """Whether ``value`` is neither None (JSON) nor NaN (pandas)."""
    return value is not None and value == value


def finite_mean(values: Iterable[float]) -> float | None:
    """Mean of the finite values (the PSNR of equal images is infinite); None if there are none."""
    numbers = np.asarray(values if isinstance(values, (pd.Series, np.ndarray)) else list(values), dtype=float)
    numbers = numbers[np.isfinite(numbers)]
    return float(numbers.mean()) if len(numbers) else None


def ssim_rows(records: pd.DataFrame, preset: str, grid: int) -> list[TableRow]:
    """Table 3: SSIM and MS-SSIM of image and counterfactual, by class; ``records`` as in ``RunIndex.frame``."""
    return [
        {
            "label": label,
            "n": len(rows),
            "ssim": finite_mean(rows["ssim"]),
            "ssim_sd": float(rows["ssim"].std()) if len(rows) > 1 else None,
            "ssim_interval": _interval(rows, "ssim"),
            "ms_ssim": finite_mean(rows["ms_ssim"]),
            "ms_ssim_interval": _interval(rows, "ms_ssim"),
            "ms_ssim_scales": int(rows["ms_ssim_scales"].iloc[0]),
            "psnr": finite_mean(rows["psnr"]),
            "l1": finite_mean(rows["l1"]),
            "attribution_energy": finite_mean(rows["attribution_energy"]),
            "attribution_energy_lung_fraction": finite_mean(rows["attribution_energy_lung_fraction"].dropna()),
            "preset": preset,
            "grid": grid,
        }
        for label, rows in by_label(records)
    ]


def add_lpips(rows: list[TableRow], scores: list[TableRow]) -> None:
    """Add the LPIPS of the sampled ``scores`` to the SSIM ``rows``, with its own N and interval."""
    if not scores or "lpips" not in scores[0]:
        return
    sampled = {label: pairs.dropna(subset=["lpips"]) for label, pairs in by_label(pd.DataFrame(scores))}
    for row in rows:
        pairs = sampled.get(row["label"])
        if pairs is not None and len(pairs):
            row |= {"lpips": finite_mean(pairs["lpips"].astype(float)), "lpips_interval": _interval(pairs, "lpips"),
                    "lpips_n": len(pairs)}  # fmt: skip


def _interval(rows: pd.DataFrame, column: str) -> list[float]:
    """95 % bootstrap interval of a column's mean over patients, or over images where patients are unknown."""
    within = (-1.0, 1.0) if "ssim" in column else (0.0, 1.0 if column in SIMPLE else np.inf)  # LPIPS has no upper end
    return list(group_bootstrap(rows[column].to_numpy(float), rows[_group(rows)].to_numpy(), within=within))


def _group(rows: pd.DataFrame) -> str:
    """The column of patients, or of images."""
    return next(name for name in ("group", "image", "image_path") if name in rows)


def validity_rows(records: pd.DataFrame) -> list[TableRow]:
    """Flip rate by class: the fraction of the images called abnormal whose counterfactual is called healthy."""
    columns = ["judge_image", "judge_counterfactual"]
    judged = records[[name for name in ("label", "setting", *columns) if name in records]].dropna(subset=columns)
    rates = []
    for label, rows in by_label(judged):
        rate, n = flip_rate(rows["judge_image"].to_numpy(), rows["judge_counterfactual"].to_numpy())
        rates.append(
            {
                "label": label,
                "n": n,
                "flip_rate": None if math.isnan(rate) else rate,
                "called_healthy_before": float((rows["judge_image"] > 0.5).mean()),
                "confidence_gain": float((rows["judge_counterfactual"] - rows["judge_image"]).mean()),
            }
        )
    return rates


def localization_rows(
    localization: LocalizationScores, thresholds: dict[str, float] | None, source: str | None
) -> list[TableRow]:
    """Localisation by class and map, with bootstrap intervals over patients.

    ``thresholds``: by map, fixed on another set, whose name is ``source``; without them there is no fixed Dice. Raises
    ValueError for a threshold off the grid of the Dice curves."""
    if not len(localization.images):
        return []
    table = []
    for name in localization.images["map"].unique():
        for label, rows in by_label(localization.images[localization.images["map"] == name]):
            row: TableRow = {"label": label, "n": len(rows), **{key: finite_mean(rows[key]) for key in SIMPLE}}
            row |= {f"{key}_interval": _interval(rows, key) for key in ("auroc", "auprc")}
            hits, groups = rows["pointing_game"].to_numpy(float), rows[_group(rows)].to_numpy()
            row["pointing_game_interval"] = list(proportion_interval(hits, groups))
            row |= {"map": name, "region": ", ".join(sorted(rows["region"].unique()))}
            row["lesion_in_region"] = finite_mean(rows["lesion_in_region"])
            of_setting = under(name, rows["setting"].iloc[0] if "setting" in rows else "")
            row |= _fixed(localization, name, of_setting, sorted(rows["label"].unique()), thresholds or {})
            if "threshold" in row:
                row["threshold_from"] = source
            if name in OURS:
                row |= _against_best(rows, localization.images)
            table.append(row)
    return table


def _fixed(
    localization: LocalizationScores, name: str, of_setting: str, labels: Sequence[str], thresholds: Mapping[str, float]
) -> TableRow:
    """Dice of a map at its fixed threshold, and IoU at that of each class: the mean over ``labels``, as CheXlocalize
    defines mIoU (Saporta et al. 2022). Empty without thresholds."""
    row: TableRow = {}
    threshold = thresholds.get(of_setting, thresholds.get(name))
    if threshold is not None:
        curve = localization.mean_curve(of_setting, None if len(labels) > 1 else labels[0])
        row |= {"dice_fixed": float(dice_at(curve, threshold)[0]), "threshold": threshold}
    of_class = [thresholds.get(of_finding(of_setting, one), thresholds.get(of_finding(name, one))) for one in labels]
    curves = {one: localization.mean_curve(of_setting, one, iou=True) for one in labels}
    ious = [dice_at(curves[one], at)[0] for one, at in zip(labels, of_class) if at is not None]
    if len(ious) == len(labels):
        row["iou_fixed"] = float(np.mean(ious))
    return row


def _against_best(ours: pd.DataFrame, images: pd.DataFrame) -> TableRow:
    """The baseline with the highest mean AUROC on the images of ``ours``, and the paired difference to it with its
    interval over patients; empty without a baseline."""
    key = "record_id" if "record_id" in images else "map_path"
    theirs = images[images["map"].isin(BASELINES) & images[key].isin(ours[key])]
    if not len(theirs):
        return {}
    means = theirs.groupby("map", observed=True, sort=False)["auroc"].mean()
    best = str(means.idxmax())
    of_best = theirs[theirs["map"] == best].set_index(key)["auroc"]
    differences = ours["auroc"].to_numpy(float) - of_best.reindex(ours[key]).to_numpy(float)
    interval = group_bootstrap(differences, ours["group"].to_numpy(), within=(-1.0, 1.0))
    return {"baseline": best, "minus_baseline": finite_mean(differences), "minus_baseline_interval": list(interval)}


def best_thresholds(localization: LocalizationScores) -> dict[str, float]:
    """The threshold with the best mean Dice of each map (and setting of a sweep), and that with the best mean IoU of
    each map and class (``of_finding``), for ``--threshold-from``."""
    names = dict.fromkeys(name for name, _ in localization.curves)
    dice = {name: fixed_threshold(localization.mean_curve(name))[0] for name in names}
    return dice | {
        of_finding(name, label): fixed_threshold(localization.mean_curve(name, label, iou=True))[0]
        for name, label in localization.curves
    }


def ground_truth_rows(scores: pd.DataFrame) -> list[TableRow]:
    """Similarity to the ground-truth counterfactual by class.

    ``lesion_error_ratio``: the counterfactual's error inside the lesion as a fraction of the input's."""
    if not len(scores):
        return []
    return [
        {
            "label": label,
            "n": len(rows),
            **{key: finite_mean(rows[key]) for key in ("psnr", "ssim", "psnr_input", "psnr_reconstruction")},
            "lesion_error_ratio": float(rows["lesion_error"].sum() / max(rows["lesion_error_input"].sum(), 1e-12)),
        }
        for label, rows in by_label(scores)
    ]


FORMATS = ("csv", "md", "tex", "json")
# Labels come from other people's files: what their signs would do to the reader of a table.
FORMULA = ("=", "+", "-", "@", "\t", "\r")
NUMBERS = re.compile(r"[-+.\de]+( to [-+.\de]+)*")  # such as an interval
MARKDOWN = re.compile(r"[\\`*\[\]<>|]")


def write_table(store: Store, name: str, rows: list[TableRow], caption: str) -> None:
    """Write ``tables/<name>`` in all FORMATS; nested values are kept only in the JSON.

    Without rows, delete the table of an earlier reduce, which had other records or options."""
    if not rows:
        for extension in FORMATS:
            store.delete(f"tables/{name}.{extension}")
        return
    flat = pd.DataFrame([{key: _cell(value) for key, value in row.items()} for row in rows])
    heads = [str(column).replace("_", " ") for column in flat.columns]
    cells = [[str(value) if known(value) else "" for value in row] for row in flat.to_numpy()]
    write_files(store, name, {"caption": caption, "rows": rows}, flat, heads, cells)


def write_files(
    store: Store, name: str, document: dict[str, Any], numbers: pd.DataFrame, heads: list[str], cells: list[list[str]]
) -> None:
    """Write ``tables/<name>``: ``document`` as JSON, ``numbers`` as CSV, cells as Markdown and LaTeX (booktabs)."""
    title = f"**{document['title']}**\n\n" if "title" in document else ""
    lines = [[one_line(cell, 1000) for cell in row] for row in cells]
    tex = pd.DataFrame(lines, columns=heads).to_latex(index=False, escape=True)
    files = {
        "json": json.dumps(clean(document), indent=1),
        "csv": csv(numbers),
        "md": f"{title}{markdown(heads, cells)}\n\n{document['caption']}\n",
        "tex": f"{tex}% {document['caption']}\n",
    }
    for extension, text in files.items():
        store.put(f"tables/{name}.{extension}", text.encode())


def csv(table: pd.DataFrame) -> str:
    """Format a table as CSV; a text that a spreadsheet would execute as a formula begins with an apostrophe."""

    def inert(value: Any) -> Any:
        formula = isinstance(value, str) and value.startswith(FORMULA) and not NUMBERS.fullmatch(value)
        return f"'{value}" if formula else value

    text: str = table.map(inert).to_csv(index=False)
    return text


def markdown(heads: list[str], cells: list[list[str]]) -> str:
    """Format text cells as a Markdown table."""
    rows = [[MARKDOWN.sub(r"\\\g<0>", one_line(cell, 1000)) for cell in row] for row in [heads, *cells]]
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(heads), *rows[1:]])


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(part)}" for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return " to ".join(str(_cell(part)) for part in value)
    return value


def clean(value: Any) -> Any:
    """Make a value fit for JSON: NaN and infinity become None."""
    if isinstance(value, dict):
        return {key: clean(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(part) for part in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value
