"""Key figures, summary sentences and table cells of the pages: numbers as text.

Everything is read from the metrics of ``diffva reduce``; only the Wilson interval of the flip rate is computed here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffva_ray.evaluate.judge_quality import wilson
from diffva_ray.evaluate.tables import ALL, overall
from diffva_ray.schema import TableRow

INTERVAL = "95% interval"  # heading of columns with intervals


@dataclass(frozen=True)
class Card:
    """One key figure."""

    title: str
    value: str
    detail: str  # one line or several; a 95 % interval comes first where there is one


@dataclass(frozen=True)
class Cell:
    """One table cell."""

    text: str
    number: bool = True  # right-aligned
    best: bool = False  # the best value of its group


@dataclass(frozen=True)
class Group:
    """Table rows under one heading."""

    title: str  # empty: no heading
    rows: list[tuple[str, list[Cell]]]  # (kind, cells); kind is "ours", "total" or empty


@dataclass(frozen=True)
class Table:
    """A table of a page, rendered by ``table.html``."""

    key: str  # id of its section
    title: str
    caption: str
    heads: list[tuple[str, bool]]  # (heading, whether the column holds numbers)
    groups: list[Group]
    warnings: list[str] = field(default_factory=list)
    style: str = ""  # CSS classes


def text_table(key: str, title: str, caption: str, heads: Sequence[str], rows: Any, style: str = "") -> Table:
    """A table whose ``rows`` are already text."""
    body = [("", [Cell(text, False) for text in row]) for row in rows]
    return Table(key, title, caption, [(head, False) for head in heads], [Group("", body)], style=style)


def plain(label: str) -> str:
    """The name of a class, map or column with spaces instead of underscores."""
    return str(label).replace("_", " ")


def number(value: Any, digits: int = 3) -> str:
    """A number with a minus sign (U+2212); a dash for a missing value."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", "−")


def count(value: Any) -> str:
    """An integer with a narrow space between thousands."""
    return f"{value:,}".replace(",", "\u202f")


def percent(value: Any) -> str:
    """A fraction as per cent."""
    return "–" if value is None else f"{number(100 * value, 1)} %"


def signed(value: Any) -> str:
    """A difference, with its sign."""
    return "–" if value is None else f"{'+' if value > 0 else ''}{number(value)}"


def interval(value: Any) -> str:
    """A pair of bounds."""
    return "–" if not value or value[0] is None else f"{number(value[0])} to {number(value[1])}"


def decibel(value: Any) -> str:
    """A value in dB."""
    return number(value, 1)


def cards(metrics: Mapping[str, Any] | None, done: Mapping[str, Any]) -> list[Card]:
    """The key figures that apply. ``done``: the numbers of records planned, ok and quarantined."""
    bad = done["quarantined"]
    result = [Card("Records", count(done["ok"]), f"ok of {count(done['planned'])} planned, {count(bad)} quarantined")]
    metrics = metrics or {}
    if metrics.get("problems"):
        return [*result, Card("Results", "–", "not stated: see the warnings above")]
    # judge
    flips = overall(metrics.get("validity", []))
    if flips and flips["flip_rate"] is not None and (problem := judge_problem(metrics)):
        result.append(Card("Flip rate", "–", f"not stated: {problem}"))
    elif flips and flips["flip_rate"] is not None:
        low, high = wilson(flips["flip_rate"], flips["n"])
        detail = f"{number(100 * low, 1)} to {percent(high)}\nof {count(flips['n'])} images called abnormal"
        detail += "".join(f"\n{text}" for text in _beside(flips))
        detail += f"\njudge {judge_tested(metrics.get('judge'))}"
        result.append(Card("Flip rate", percent(flips["flip_rate"]), detail))
    # attribution maps against known lesions
    ours = _localization(metrics, "positive")
    if ours:
        title = "AUROC, whole image" if ours["region"] == "image" else "AUROC in lungs"
        detail = _against_baseline(ours) or f"n = {count(ours['n'])}"
        if ours.get("auroc_interval") and ours["auroc_interval"][0] is not None:
            detail = f"{interval(ours['auroc_interval'])}\n{detail}"
        result.append(Card(title, number(ours["auroc"]), detail))
        if ours.get("dice_fixed") is not None:
            detail = f"τ = {ours['threshold']:.3g} from {ours['threshold_from']}"
            result.append(Card("Dice at fixed τ", number(ours["dice_fixed"]), detail))
    # distance to the ground truth and to the image
    if truth := overall(metrics.get("ground_truth", [])):
        detail = "of the image’s own error, to the ground-truth counterfactual"
        result.append(Card("Lesion error left", percent(truth["lesion_error_ratio"]), detail))
    if similar := overall(metrics.get("ssim", [])):
        spread = f"± {number(similar['ssim_sd'])}, " if similar.get("ssim_sd") is not None else ""
        detail = f"{spread}preset {similar['preset']}, {similar['grid']} px"
        result.append(Card("SSIM, mean", number(similar["ssim"]), detail))
    return result


def glance(metrics: Mapping[str, Any] | None) -> list[str]:
    """The main results in at most three sentences; none before the run has been reduced."""
    metrics, sentences = metrics or {}, []
    if metrics.get("problems"):
        return [f"No result is stated, for the {'reasons' if len(metrics['problems']) > 1 else 'reason'} above."]
    flips = overall(metrics.get("validity", []))
    if flips and flips["flip_rate"] is not None and (problem := judge_problem(metrics)):
        sentences.append(f"No flip rate is stated, because {problem}.")
    elif flips and flips["flip_rate"] is not None:
        sentences.append(
            f"Of {count(flips['n'])} images that the model’s own judge ({judge_tested(metrics.get('judge'))}) calls "
            f"abnormal, it calls {percent(flips['flip_rate'])} of the counterfactuals healthy "
            f"({'; '.join(_beside(flips))})."
        )
    ours = _localization(metrics, "positive")
    if ours:
        beside = f"; {text}" if (text := _against_baseline(ours)) else ""
        sentences.append(
            f"The attribution maps find the known lesions of {count(ours['n'])} images with an AUROC of "
            f"{number(ours['auroc'])}{beside}."
        )
    if truth := overall(metrics.get("ground_truth", [])):
        sentences.append(
            f"Inside the lesion, {percent(truth['lesion_error_ratio'])} of the difference between the image and its "
            "ground-truth counterfactual is left."
        )
    return sentences


def _localization(metrics: Mapping[str, Any], map_name: str) -> TableRow | None:
    return overall(row for row in metrics.get("localization", []) if row["map"] == map_name)


def _against_baseline(ours: TableRow) -> str:
    """How much higher the AUROC is than that of the best map without a counterfactual; empty if that is unknown."""
    if ours.get("minus_baseline") is None:
        return ""
    name = plain(ours["baseline"]).replace("pca", "PCA")
    low = ours["minus_baseline_interval"][0]
    verdict = "" if low is not None and low > 0 else ", which is not clearly better"
    difference = f"{signed(ours['minus_baseline'])} ({interval(ours['minus_baseline_interval'])})"
    return f"{difference} against the best baseline, {name}{verdict}"


def _beside(flips: TableRow) -> list[str]:
    """What a flip rate is read against: the rates of reconstruction and ground truth, and the mean confidence gain."""
    names = {"reconstruction": "of reconstructions", "ground_truth": "of ground-truth counterfactuals"}
    rates = [(flips.get(f"flip_rate_{key}"), name) for key, name in names.items()]
    gain = f"mean confidence gain {number(flips['confidence_gain'])}"
    return [*(f"{percent(rate)} {name}" for rate, name in rates if rate is not None), gain]


def judge_tested(judge: Mapping[str, Any] | None) -> str:
    """The judge's accuracy on images held out of its training, with its interval."""
    if not judge or judge["accuracy"] is None:
        return "not tested on held-out images"
    low, high = wilson(judge["accuracy"], judge["n"])
    return (
        f"right on {percent(judge['accuracy'])} of {count(judge['n'])} held-out images, {number(100 * low, 1)} to "
        f"{percent(high)}"
    )


def judge_problem(metrics: Mapping[str, Any]) -> str:
    """Why the flip rate must not be stated; empty where it may."""
    judge: dict[str, str] = metrics.get("judge") or {}
    return judge.get("problem", "")


def is_overall(label: str) -> bool:
    """Whether a row is over all classes, also under one setting of a sweep."""
    return label == ALL or label.startswith(f"{ALL} under ")


def class_name(label: str) -> str:
    """The displayed name of a class, or of all classes together."""
    return f"all classes{plain(label)[len(ALL) :]}" if is_overall(label) else plain(label)
