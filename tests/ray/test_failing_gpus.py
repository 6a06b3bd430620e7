"""A GPU that fails blames no record, and the run goes on without it. Ray counts two GPUs here; there are none."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import ray

from diffva_ray.config.recipe import Recipe
from diffva_ray.distributed import generate as ray_generate
from diffva_ray.distributed import session
from diffva_ray.distributed.failing_gpus import DEVICES
from diffva_ray.generate.attempts import GpuFailed
from diffva_ray.generate.plan import Request
from diffva_ray.generate.run import find_run
from diffva_ray.generate.verification import verify
from diffva_ray.storage.local import LocalStore
from diffva_ray.workflows import generate as workflow
from diffva_ray.workflows.execution import Execution

ECC = "CUDA error: uncorrectable ECC error encountered"


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    for name, value in session.ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    ray.init(
        address="local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        _node_ip_address="127.0.0.1", runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def undisturbed(tiny: Recipe, images: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    out = tmp_path_factory.mktemp("undisturbed")
    workflow.generate_run(tiny, str(images), str(model), str(out), Request(), Execution(executor="inline"))
    return records(out)


def records(out: Path) -> pd.DataFrame:
    parts = [pd.read_parquet(part) for part in sorted((out / "records").glob("part-*.parquet"))]
    return pd.concat(parts, ignore_index=True)


def faulty(errors_in: str, at_start: bool = False, wait_for: int = 0) -> type:
    """A worker whose networks run on the CPU, and fail as on a broken GPU where ``errors_in`` names the GPU ("1") or
    the number of the shard ("shard 1"); "*": everywhere. Others wait until so many errors are noted."""

    from diffva_ray.counterfactual.engine import CounterfactualEngine

    def broken(*_: object) -> None:
        raise RuntimeError(ECC)

    class Faulty(ray_generate.ShardWorker):
        def opened(self, run: str, data: str, model: str, device: str, *rest: Any) -> Any:
            if at_start and errors_in in ("*", self.gpu.number):
                CounterfactualEngine.__init__ = broken  # in this process alone
            return super().opened(run, data, model, "cpu", *rest)

        def _run(self, shard: int) -> dict[str, Any]:
            if not self.refusal:
                ends = time.monotonic() + 100
                while self.gpu.number != errors_in and time.monotonic() < ends and (
                    len(list(self.store.list(DEVICES))) < wait_for
                ):  # fmt: skip
                    time.sleep(0.2)
                call = type(self.context.engine).__call__

                def failing(engine: Any, *arguments: Any) -> Any:
                    if errors_in in ("*", self.gpu.number, f"shard {shard}"):
                        raise RuntimeError(ECC)
                    return call(engine, *arguments)

                self.context.engine.__class__ = type("Failing", (type(self.context.engine),), {"__call__": failing})
            ray_generate.REFUSAL_PAUSE = 1.0
            return super()._run(shard)

    return Faulty


def generate(worker: type, tiny: Recipe, images: Path, model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from diffva_ray.counterfactual import engine

    plain = ray_generate.generate
    monkeypatch.setattr(ray_generate, "generate", lambda *words, **more: plain(*words, worker=worker, **more))
    monkeypatch.setattr(engine, "device_kind", lambda: "cuda")
    return workflow.generate_run(tiny, str(images), str(model), str(out), Request(), Execution(executor="ray"))


@pytest.mark.parametrize("at_start", [False, True])
def test_the_run_goes_on_without_a_gpu_that_fails(
    at_start: bool, undisturbed: pd.DataFrame, tiny: Recipe, images: Path, model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr("diffva_ray.progress.LOG.propagate", True)
    counts = generate(faulty("1", at_start, 1 if at_start else 2), tiny, images, model, tmp_path, monkeypatch)
    assert counts == {"shards": 3, "records": 18, "ok": 18}
    assert records(tmp_path).equals(undisturbed)
    run = find_run(LocalStore(str(tmp_path)))
    assert run is not None
    assert verify(run) == []
    (line,) = {each.getMessage() for each in caplog.records if "goes on without it" in each.getMessage()}
    assert line.startswith("GPU 1 of ")
    left = [entry.path for entry in run.store.list("attempts")]
    assert {path.split("/")[1] for path in left} == {"devices"}  # what failed; no record is blamed


def test_without_any_gpu_left_the_run_ends_with_one_line(
    tiny: Recipe, images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(GpuFailed, match=r"no GPU is left: GPU \d of .*; GPU \d of .*same command continues"):
        generate(faulty("*", at_start=True), tiny, images, model, tmp_path, monkeypatch)


@pytest.mark.slow  # half a minute of pauses, and many where the machine is busy
def test_a_shard_on_which_gpus_fail_is_given_up_and_the_others_are_done(
    undisturbed: pd.DataFrame, tiny: Recipe, images: Path, model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with pytest.raises(GpuFailed, match=r"part-00001: 3 attempts ended with an error of a GPU\. The other"):
        generate(faulty("shard 1"), tiny, images, model, tmp_path, monkeypatch)
    assert sorted(file.name for file in (tmp_path / "records").iterdir()) == [
        "part-00000.parquet",
        "part-00002.parquet",
    ]
    monkeypatch.undo()
    generate(faulty("nowhere"), tiny, images, model, tmp_path, monkeypatch)
    assert records(tmp_path).equals(undisturbed)
