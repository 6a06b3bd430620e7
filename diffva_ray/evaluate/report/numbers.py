"""The numbers of the page: key figures as cards, numbers as text, what a table is. Nothing but one interval is computed
here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from diffva_ray.evaluate.judge_quality import wilson
from diffva_ray.evaluate.tables import ALL, overall
from diffva_ray.schema import Row


@dataclass(frozen=True)
class Card:
    """One key figure; ``detail`` may have several lines, a 95 % interval first where there is one."""

    title: str
    value: str
    detail: str


@dataclass(frozen=True)
class Cell:
    """One cell: its text, whether it is a number, and whether it is the best of its group."""

    text: str
    number: bool
    best: bool = False


@dataclass(frozen=True)
class Group:
    """Rows under one heading; each row is (kind, cells) with kind ``ours``, ``total`` or nothing."""

    title: str
    rows: list[tuple[str, list[Cell]]]


@dataclass(frozen=True)
class Table:
    """A table with its caption and the warnings that belong beside it."""

    key: str
    title: str
    caption: str
    heads: list[tuple[str, bool]]
    groups: list[Group]
    warnings: list[str] = field(default_factory=list)


def plain(label: str) -> str:
    """A class or map name for people."""
    return str(label).replace("_", " ")


def number(value: Any, digits: int = 3) -> str:
    """A number with a true minus sign; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", "−")


def count(value: Any) -> str:
    return f"{value:,}".replace(",", "\u202f")


def percent(value: Any) -> str:
    return "–" if value is None else f"{number(100 * value, 1)} %"


def interval(value: Any) -> str:
    return "–" if not value or value[0] is None else f"{number(value[0])} to {number(value[1])}"


def decibel(value: Any) -> str:
    return number(value, 1)


def cards(metrics: Row | None, done: Row) -> list[Card]:
    """The key figures that apply. ``done``: counts planned, ok and quarantined, known without any table."""
    bad = done["quarantined"]
    found = [Card("Records", count(done["ok"]), f"ok of {count(done['planned'])} planned, {count(bad)} quarantined")]
    metrics = metrics or {}
    flips = overall(metrics.get("validity", []))
    if flips and flips["flip_rate"] is not None and (problem := judge_problem(metrics)):
        found.append(Card("Flip rate", "–", f"not stated: {problem}"))
    elif flips and flips["flip_rate"] is not None:
        low, high = wilson(flips["flip_rate"], flips["n"])
        detail = f"{number(100 * low, 1)} to {percent(high)}\nof {count(flips['n'])} images called abnormal"
        found.append(Card("Flip rate", percent(flips["flip_rate"]), detail))
    localization = metrics.get("localization", [])
    ours = overall(row for row in localization if row["map"] == "positive")
    if ours:
        trivial = overall(row for row in localization if row["map"] == "brightness")
        where = "AUROC, whole image" if ours["region"] == "image" else "AUROC in lungs"
        beside = f"brightness alone {number(trivial['auroc'])}" if trivial else f"n = {count(ours['n'])}"
        if ours.get("auroc_interval") and ours["auroc_interval"][0] is not None:
            beside = f"{interval(ours['auroc_interval'])}\n{beside}"
        found.append(Card(where, number(ours["auroc"]), beside))
        if ours.get("dice_fixed") is not None:
            detail = f"τ = {ours['threshold']:.3g} from {ours['threshold_from']}"
            found.append(Card("Dice at fixed τ", number(ours["dice_fixed"]), detail))
    counterfactual = overall(metrics.get("ground_truth", []))
    if counterfactual:
        found.append(
            Card(
                "Lesion error left",
                percent(counterfactual["lesion_error_ratio"]),
                "of the image’s own, to the counterfactual",
            )
        )
    same = overall(metrics.get("ssim", []))
    if same:
        spread = f"± {number(same['ssim_sd'])}, " if same.get("ssim_sd") is not None else ""
        found.append(Card("SSIM, mean", number(same["ssim"]), f"{spread}preset {same['preset']}, {same['grid']} px"))
    return found


def glance(metrics: Row | None) -> list[str]:
    """What the run found, in a sentence or three; nothing before it has been reduced."""
    metrics, said = metrics or {}, []
    flips = overall(metrics.get("validity", []))
    if flips and flips["flip_rate"] is not None and (problem := judge_problem(metrics)):
        said.append(f"No flip rate is stated, because {problem}.")
    elif flips and flips["flip_rate"] is not None:
        judge = metrics.get("judge")
        tested = f" (right on {percent(judge['accuracy'])} of {count(judge['n'])} held-out images)" if judge else ""
        said.append(
            f"Of {count(flips['n'])} images that the model’s own judge{tested} calls abnormal, it calls "
            f"{percent(flips['flip_rate'])} of the counterfactuals healthy."
        )
    localization = metrics.get("localization", [])
    ours = overall(row for row in localization if row["map"] == "positive")
    trivial = overall(row for row in localization if row["map"] == "brightness")
    if ours:
        beside = f"; brightness alone reaches {number(trivial['auroc'])}" if trivial else ""
        said.append(
            f"The maps find the known lesions of {count(ours['n'])} images with an AUROC of "
            f"{number(ours['auroc'])}{beside}."
        )
    counterfactual = overall(metrics.get("ground_truth", []))
    if counterfactual:
        said.append(
            f"{percent(counterfactual['lesion_error_ratio'])} of the lesion’s difference to the "
            f"ground-truth counterfactual is left."
        )
    return said


def judge_problem(metrics: Row) -> str:
    """Why no flip rate of these metrics may be a headline; empty where it may."""
    return (metrics.get("judge") or {}).get("problem", "")


def everyone(label: str) -> bool:
    """Whether a row is over all classes, also under one setting of a sweep."""
    return label == ALL or label.startswith(f"{ALL} under ")


def class_name(label: str) -> str:
    """A class, or all of them, for people."""
    return f"all classes{plain(label)[len(ALL) :]}" if everyone(label) else plain(label)
