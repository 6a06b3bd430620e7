"""The stopwatch: every moment belongs to one stage."""

from __future__ import annotations

import pytest

from diffva_ray import progress
from diffva_ray.progress import Stopwatch


def test_a_nested_stage_counts_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 6.0, 10.0, 11.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    settled: list[int] = []
    watch = Stopwatch(lambda: settled.append(1))
    with watch("denoise"), watch("decode"):  # 0 to 6, decode from 1 to 3
        pass
    with pytest.raises(KeyError), watch("denoise"):
        raise KeyError
    assert watch.seconds == {"denoise": 1.0 + 3.0 + 1.0, "decode": 2.0}
    assert len(settled) == 6
