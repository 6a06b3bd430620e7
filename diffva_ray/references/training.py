"""What the trainings of all reference systems share: the training curve, the criterion of convergence, the wall time.

At every point of the curve a stage measures two numbers on training images: ``removed``, the share of the distance
between abnormal and healthy images that the generated images no longer have, and ``change``, the mean change of a pixel
of abnormal images. A training has converged if over the last POINTS points ``removed`` stayed within REMOVED of 1 and
both numbers stayed on a plateau. The curve is part of the model's ``progress.json``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from diffva_ray.config.reference_stages import ReferenceConfig
from diffva_ray.train.stage import Stage, StageContext, Worker

POINTS = 3  # of the curve, the last ones
REMOVED = 0.5  # distance of ``removed`` from 1 within which a generator has learnt its task
PLATEAU = 0.1  # spread of ``removed``, and of ``change`` as a fraction of its mean

History = Sequence[Mapping[str, Any]]  # logged entries: stage, step and numbers


class ReferenceStage(Stage):
    """Base of the stages of the reference systems; a stage implements ``point``."""

    config: ReferenceConfig

    def __init__(self, context: StageContext, config: ReferenceConfig) -> None:
        super().__init__(context, config)
        self.clock = time.monotonic()

    def begin(self, worker: Worker) -> None:
        self.clock = time.monotonic()

    def point(self) -> dict[str, float]:
        """Measure the networks for one point of the curve: ``removed``, ``change`` and further numbers."""
        raise NotImplementedError

    def measures(self, step: int, history: History) -> bool:
        points, every = curve(history, self.config.name), self.config.measure_every
        return every > 0 and step - (points[-1]["step"] if points else 0) >= every

    def measure(self, history: History) -> dict[str, float]:
        points, now = curve(history, self.config.name), time.monotonic()
        before = points[-1]["minutes"] if points else 0.0
        minutes = before + (now - self.clock) / 60  # a resumed training goes on from its last point
        self.clock = now
        return {**self.point(), "minutes": minutes}

    def finished(self, history: History) -> bool:
        points, config = curve(history, self.config.name), self.config
        if config.stop_when_converged and converged(points):
            return True
        return bool(points and config.max_minutes is not None and points[-1]["minutes"] >= config.max_minutes)


def curve(history: History, stage: str) -> list[dict[str, Any]]:
    """The points of a stage's curve among the logged entries."""
    return [dict(entry) for entry in history if entry["stage"] == stage and "removed" in entry]


def converged(points: History) -> bool:
    """Whether the last POINTS points of a curve fulfil the criterion."""
    if len(points) < POINTS:
        return False
    removed, change = ([point[key] for point in points[-POINTS:]] for key in ("removed", "change"))
    mean = sum(change) / POINTS
    return (
        all(abs(1 - value) < REMOVED for value in removed)
        and max(removed) - min(removed) < PLATEAU
        and max(change) - min(change) < PLATEAU * mean
    )
