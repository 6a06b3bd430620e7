"""The numbers of a single image and its counterfactual, a line each: reduce takes them of a sample of images, and each
is a column of the counterfactual table wherever that is shown (files, terminal, report, paper).

A new number is a function on arrays in a module of its own, and a line in PAIR_METRICS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from diffva_ray.metrics.counterfactual import CHANGED, Outside, changed_share, collateral_change, cout, outside_lesion

if TYPE_CHECKING:  # it loads torch
    from diffva_ray.metrics.validity import Judge

COUT_STEPS = 25


@dataclass(frozen=True)
class Pair:
    """An image and its counterfactual, float32 [size, size] in [0, 1], the signed map in [-1, 1] between them, and what
    is known of the image: its class, masks bool [size, size], its row of ``schema.RECORDS``, and the judge of the run's
    model."""

    image: NDArray[np.float32]
    counterfactual: NDArray[np.float32]
    signed_map: NDArray[np.float32]
    label: str
    record: Mapping[str, Any]
    lesion: NDArray[np.bool_] | None = None
    lungs: NDArray[np.bool_] | None = None
    judge: Judge | None = None


@dataclass(frozen=True)
class PairMetric:
    """``key``: its name in JSON and CSV; ``heading``: over a narrow column; ``title``: in full; ``of``: the number,
    None or NaN where it is unknown; ``form``: how it is printed (small: with four decimals)."""

    key: str
    heading: str
    title: str
    of: Callable[[Pair], float | None]
    form: Literal["number", "percent", "small"] = "number"


def _gain(pair: Pair) -> float | None:
    before, after = pair.record["judge_image"], pair.record["judge_counterfactual"]
    return None if before is None or after is None else after - before


def _cout(pair: Pair) -> float | None:
    if (judge := pair.judge) is None:
        return None
    healthy = judge.classes.index(judge.healthy)
    return cout(lambda images: judge.probabilities(images)[:, healthy], pair.image, pair.counterfactual, COUT_STEPS)[0]


def _collateral(pair: Pair) -> float | None:
    """Of an image of a known abnormal class."""
    judge = pair.judge
    if judge is None or pair.label not in judge.classes or pair.label == judge.healthy:
        return None
    before, after = judge.probabilities(np.stack([pair.image, pair.counterfactual]))
    return collateral_change(before, after, judge.classes.index(pair.label), judge.classes.index(judge.healthy))


def _place(pair: Pair) -> Outside | None:
    return None if pair.lesion is None else outside_lesion(pair.signed_map, pair.lesion)


def _inside(pair: Pair) -> float | None:
    place = _place(pair)
    return place.inside if place else None


def _outside(pair: Pair) -> float | None:
    place = _place(pair)
    return place.change if place else None


def _changed(pair: Pair) -> float:
    return changed_share(pair.signed_map)


def _energy(pair: Pair) -> float:
    return float(np.abs(pair.signed_map).mean())


def _in_lungs(pair: Pair) -> float | None:
    return pair.record["attribution_energy_lung_fraction"]


PAIR_METRICS = (
    PairMetric("gain", "confidence gain", "confidence gain of the judge", _gain),
    PairMetric("cout", "COUT", "COUT by the judge", _cout),
    PairMetric("collateral", "other findings", "collateral change of other classes by the judge", _collateral),
    PairMetric("changed", "pixels changed", f"share of pixels changed by > {CHANGED}", _changed, "percent"),
    PairMetric("energy", "mean |M|", "mean |M|", _energy, "small"),
    PairMetric("in_lungs", "of it in lungs", "share of |M| in the lungs", _in_lungs, "percent"),
    PairMetric("inside_change", "|M| in lesion", "mean |M| in the lesion", _inside, "small"),
    PairMetric("outside_change", "outside it", "mean |M| outside it (hallucination)", _outside, "small"),
)
