"""The networks of a run are compiled on a GPU by default, once for each machine, and never silently not."""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from diffva_ray.config.recipe import GenerateConfig, Recipe
from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.generate.compilation import compile_networks, first_alone
from diffva_ray.generate.keys import pixel_keys
from diffva_ray.generate.plan import Request
from diffva_ray.generate.run import Unfinished
from diffva_ray.model.bundle import Bundle


@pytest.mark.parametrize(
    ("setting", "every", "device", "compiled"),
    [(None, 1, "cpu", False), (None, 1, "cuda", True), (None, 2, "cuda", False), (False, 1, "cuda", False),
     (True, 1, "cpu", True)],
)  # fmt: skip
def test_the_fingerprint_says_whether_the_networks_are_compiled(
    tiny: Recipe, setting: bool | None, every: int, device: str, compiled: bool
) -> None:
    config = GenerateConfig.model_validate(
        {**tiny.generate.model_dump(), "compile": setting, "acceleration": {"deep_features_every": every}}
    )
    recipe = tiny.model_copy(update={"generate": config})
    assert pixel_keys(recipe, Request(), "m", "2.0", device)["compile"] is compiled


def test_a_run_stays_compiled_on_another_device(tiny: Recipe) -> None:
    """So that --allow-environment-change changes the environment alone."""
    on_gpu = pixel_keys(tiny, Request(), "m", "2.0", "cuda")
    later = pixel_keys(tiny, Request(), "m", "2.0", "cpu", planned_on="cuda")
    assert {key for key in on_gpu if on_gpu[key] != later[key]} == {"device"}


def test_networks_that_cannot_be_compiled_end_the_worker_in_one_line(complete: Callable[[], Bundle]) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise FileNotFoundError("Failed to find C compiler")

    engine = CounterfactualEngine(complete(), device="cpu")
    with pytest.raises(Unfinished, match=r"Failed to find C compiler.*--set generate\.compile=false") as caught:
        compile_networks(engine, broken)
    assert "\n" not in str(caught.value)


def test_an_error_of_the_networks_is_not_taken_for_one_of_the_compiler(
    complete: Callable[[], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = CounterfactualEngine(complete(), device="cpu")
    for text in ("CUDA error: an illegal memory access was encountered", "a shape is wrong"):

        def fail(*_: Any, text: str = text, **__: Any) -> Any:
            raise RuntimeError(text)

        monkeypatch.setattr(engine.model, "encode", fail)
        with pytest.raises(RuntimeError, match=text):
            compile_networks(engine, "eager")

    def short(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine.model, "encode", short)
    compile_networks(engine, "eager")  # the first shard meets it, and counts it


def test_the_first_goes_alone_and_the_others_together(tmp_path: Path) -> None:
    lock, entered, together = tmp_path / "lock", threading.Event(), threading.Barrier(3, timeout=30)

    def other(_: int) -> None:
        with first_alone(lock):
            entered.set()
            together.wait()  # all three are in at once

    with ThreadPoolExecutor(3) as pool:
        with first_alone(lock), lock.open() as follower:
            first = pool.submit(other, 0)
            assert not entered.wait(0.2)
            with pytest.raises(BlockingIOError):
                fcntl.flock(follower, fcntl.LOCK_SH | fcntl.LOCK_NB)
        with lock.open() as follower:
            fcntl.flock(follower, fcntl.LOCK_SH)  # as one that has waited for the first
            for one in (first, *(pool.submit(other, n) for n in (1, 2))):
                one.result(30)


def test_a_first_one_that_fails_lets_the_others_through(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fails"), first_alone(tmp_path / "lock"):
        raise ValueError("it fails")
    with first_alone(tmp_path / "lock"):
        pass
