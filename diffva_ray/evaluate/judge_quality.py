"""Checks a judge on images held out of its training: the flip rate of a judge that guesses has no meaning."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from diffva_ray.generate.run import Run
from diffva_ray.model.card import UnusableModel, judge_card, read_card
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import StoreError


@dataclass(frozen=True)
class JudgeQuality:
    """The test of a judge on images held out of its training."""

    accuracy: float | None  # None: no image was held out
    n: int  # number of held-out images
    chance: float  # accuracy of always naming the most common class

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the accuracy; None for an untested judge."""
        return None if self.accuracy is None or not self.n else wilson(self.accuracy, self.n)

    @property
    def problem(self) -> str:
        """Why the judge's flip rate has no meaning; empty if the judge is better than chance."""
        if self.interval is None:
            return "the judge was tested on no image (no class of its training data has ten images)"
        low, high = self.interval
        if low > self.chance:
            return ""
        return (
            f"the judge is at chance: {self.accuracy:.1%} of {self.n} held-out images right "
            f"({low:.1%} to {high:.1%}), where always naming one class has {self.chance:.1%}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For ``tables/metrics.json``."""
        return {**asdict(self), "interval": self.interval, "problem": self.problem}


def judge_quality(run: Run) -> JudgeQuality | None:
    """The quality of the run's judge, from ``run.json`` or, if that lacks it, from the folder of the same model; None
    if neither has it."""
    judge = run.about.get("judge")
    if judge is None:
        try:
            store = open_store(str(run.about["model"]))
            card = read_card(store)
            judge = judge_card(store) if card and card["digest"] == run.keys["model_digest"] else None
        except (KeyError, OSError, StoreError, UnusableModel, ValueError):
            return None
    if not judge:
        return None
    tested = judge.get("calibration") or {}
    chance = tested.get("chance", 1 / max(len(judge["classes"]), 1))
    return JudgeQuality(tested.get("accuracy"), int(tested.get("images", 0)), float(chance))


def wilson(rate: float, n: int) -> tuple[float, float]:
    """95 % interval of a proportion over ``n`` trials, also valid at 0 and 1 (Wilson 1927)."""
    z = 1.959964
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(centre - half, 0.0), min(centre + half, 1.0)
