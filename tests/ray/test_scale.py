"""Many pretended GPUs: nothing in the distributed path delays the actors (benchmarks/scale.py has the curve)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from scale import efficiency, pretended_gpus, simulate


def test_four_actors_share_the_shards() -> None:
    with pretended_gpus(4):
        reports = simulate(4, 40, service=0.5)
    assert sorted(report["shard"] for report in reports) == list(range(40))
    assert len({report["worker"] for report in reports}) > 1  # the slow test measures how well they share


@pytest.mark.slow
@pytest.mark.parametrize("actors", [8, 32])
def test_actors_never_wait(actors: int) -> None:
    with pretended_gpus(actors):
        reports = simulate(actors, 12 * actors, service=3.0)
    assert sorted(report["shard"] for report in reports) == list(range(12 * actors))
    assert efficiency(reports, actors) >= 0.95


def test_efficiency_is_the_share_of_the_time_at_work() -> None:
    shards = [(1, 0.0, 1.0), (1, 1.0, 2.0), (2, 0.5, 1.5), (2, 2.0, 3.0)]
    reports = [{"worker": worker, "began": began, "ended": ended} for worker, began, ended in shards]
    assert efficiency(reports, 2) == pytest.approx((1.5 + 1.0) / (2 * 1.5))
