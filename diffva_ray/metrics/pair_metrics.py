"""Metrics of an image and its counterfactual, one line each. ``reduce`` computes them on a sample of images; each is a
column of the counterfactual table in files, terminal, report and paper.

To add one, write a function on arrays in its own module, and add a line to PAIR_METRICS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from diffva_ray.metrics.counterfactual import (
    CHANGED,
    Outside,
    causal_pair,
    changed_share,
    collateral_change,
    cout,
    outside_lesion,
)
from diffva_ray.schema import Record

if TYPE_CHECKING:  # the module loads torch
    from diffva_ray.metrics.validity import Judge

COUT_STEPS = 25  # replacements of pixels per COUT curve


@dataclass(frozen=True)
class Pair:
    """An image, its counterfactual, and everything that a metric may read besides."""

    image: NDArray[np.float32]  # grey [size, size] in [0, 1]
    counterfactual: NDArray[np.float32]  # grey [size, size] in [0, 1]
    signed_map: NDArray[np.float32]  # attribution map [size, size] in [-1, 1]
    label: str  # the image's class
    record: Record  # the image's row of ``schema.RECORDS``
    lesion: NDArray[np.bool_] | None = None  # lesion mask [size, size]
    lungs: NDArray[np.bool_] | None = None  # lung mask [size, size]
    judge: Judge | None = None  # judge of the run's model


@dataclass(frozen=True)
class PairMetric:
    """One metric, and how tables show it."""

    key: str  # name in JSON and CSV
    heading: str  # above a narrow column
    title: str  # in full
    of: Callable[[Pair], float | None]  # the number; None or NaN where it is unknown
    form: Literal["number", "percent", "small"] = "number"  # how it is printed; small: with four decimals


def _gain(pair: Pair) -> float | None:
    before, after = pair.record["judge_image"], pair.record["judge_counterfactual"]
    return None if before is None or after is None else after - before


def _cout(pair: Pair) -> float | None:
    if (judge := pair.judge) is None:
        return None
    healthy = judge.classes.index(judge.healthy)
    return cout(lambda images: judge.probabilities(images)[:, healthy], pair.image, pair.counterfactual, COUT_STEPS)[0]


def _causal(pair: Pair, mirrored: bool) -> float | None:
    """1 if the changed pixels, or those of their mirror image, decide the judge's answer, else 0."""
    if (judge := pair.judge) is None:
        return None
    region = np.abs(pair.signed_map) > CHANGED
    right = causal_pair(
        judge.healthy_probability, pair.image, pair.counterfactual, region[:, ::-1] if mirrored else region
    )
    return None if right is None else float(right)


def _causal_pair(pair: Pair) -> float | None:
    return _causal(pair, mirrored=False)


def _causal_mirrored(pair: Pair) -> float | None:
    return _causal(pair, mirrored=True)


def _collateral(pair: Pair) -> float | None:
    """None unless the image has an abnormal class that the judge knows."""
    judge = pair.judge
    if judge is None or pair.label not in judge.classes or pair.label == judge.healthy:
        return None
    before, after = judge.probabilities(np.stack([pair.image, pair.counterfactual]))
    return collateral_change(before, after, judge.classes.index(pair.label), judge.classes.index(judge.healthy))


def _lesion_change(pair: Pair) -> Outside | None:
    return None if pair.lesion is None else outside_lesion(pair.signed_map, pair.lesion)


def _inside(pair: Pair) -> float | None:
    return change.inside if (change := _lesion_change(pair)) else None


def _outside(pair: Pair) -> float | None:
    return change.change if (change := _lesion_change(pair)) else None


def _changed(pair: Pair) -> float:
    return changed_share(pair.signed_map)


def _energy(pair: Pair) -> float:
    return float(np.abs(pair.signed_map).mean())


def _in_lungs(pair: Pair) -> float | None:
    return pair.record["attribution_energy_lung_fraction"]


PAIR_METRICS = (
    PairMetric("gain", "confidence gain", "confidence gain of the judge", _gain),
    PairMetric("cout", "COUT", "COUT by the judge", _cout),
    PairMetric("causal_pair", "causal pair", "changed pixels alone decide the judge", _causal_pair, "percent"),
    PairMetric("causal_mirrored", "mirrored", "the same of their mirror image (chance)", _causal_mirrored, "percent"),
    PairMetric("collateral", "other findings", "collateral change of other classes by the judge", _collateral),
    PairMetric("changed", "pixels changed", f"share of pixels changed by > {CHANGED}", _changed, "percent"),
    PairMetric("energy", "mean |M|", "mean |M|", _energy, "small"),
    PairMetric("in_lungs", "of it in lungs", "share of |M| in the lungs", _in_lungs, "percent"),
    PairMetric("inside_change", "|M| in lesion", "mean |M| in the lesion", _inside, "small"),
    PairMetric("outside_change", "outside it", "mean |M| outside it (hallucination)", _outside, "small"),
)
