"""Whether the judge can be believed: what it did on images held out of its training. A flip rate by a judge that
guesses says nothing, and looks perfect as easily as not."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from diffva_ray.generate.run import Run
from diffva_ray.model.card import UnusableModel, judge_card, read_card
from diffva_ray.storage.store import StoreError, open_store


@dataclass(frozen=True)
class JudgeQuality:
    """A judge on ``n`` images held out of its training: its ``accuracy`` (None where none were held out), and
    ``chance``, the accuracy of always naming the commonest class."""

    accuracy: float | None
    n: int
    chance: float

    @property
    def problem(self) -> str:
        """Why its flip rate says nothing, in a few words; empty where it says something."""
        if self.accuracy is None or not self.n:
            return "the judge was tested on no image (no class of its training data has ten)"
        low, high = wilson(self.accuracy, self.n)
        if low > self.chance:
            return ""
        return (
            f"the judge is at chance: {self.accuracy:.1%} of {self.n} held-out images right "
            f"({low:.1%} to {high:.1%}), where always naming one class has {self.chance:.1%}"
        )

    def as_dict(self) -> dict[str, Any]:
        """For ``tables/metrics.json``."""
        return {**asdict(self), "problem": self.problem}


def judge_quality(run: Run) -> JudgeQuality | None:
    """That of the judge that made the run's numbers: as ``run.json`` has it, or else the model's folder, if the model
    still stands there. None where neither says."""
    about = run.about.get("judge")
    if about is None:
        try:
            store = open_store(str(run.about["model"]))
            card = read_card(store)
            about = judge_card(store) if card and card["digest"] == run.keys["model_digest"] else None
        except (KeyError, OSError, StoreError, UnusableModel, ValueError):
            return None
    if not about:
        return None
    tested = about.get("calibration") or {}
    chance = tested.get("chance", 1 / max(len(about["classes"]), 1))
    return JudgeQuality(tested.get("accuracy"), int(tested.get("images", 0)), float(chance))


def wilson(rate: float, n: int) -> tuple[float, float]:
    """95 % interval of a proportion of ``n``, sensible at 0 and 1 too (Wilson 1927)."""
    z = 1.959964
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(centre - half, 0.0), min(centre + half, 1.0)
