"""On Ray: the same model and pixels as without, and a run that continues after its driver was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import ray
import torch
from safetensors.torch import load_file

from diffva_ray.config.recipe import Recipe, make_recipe, to_yaml
from diffva_ray.distributed import generate as ray_generate
from diffva_ray.distributed import session
from diffva_ray.generate.plan import Request
from diffva_ray.generate.run import FingerprintDiffers, find_run
from diffva_ray.generate.verification import verify
from diffva_ray.storage.local import LocalStore
from diffva_ray.workflows.execution import Execution
from diffva_ray.workflows.generate import generate_run
from diffva_ray.workflows.train import train_model


def records(out: Path) -> pd.DataFrame:
    parts = [pd.read_parquet(part) for part in sorted((out / "records").glob("part-*.parquet"))]
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def cluster():
    with session.connect(cpus=2):
        yield


@pytest.fixture(scope="module")
def inline(tiny: Recipe, images: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    out = tmp_path_factory.mktemp("inline")
    generate_run(tiny, str(images), str(model), str(out), Request(), Execution(executor="inline"))
    return records(out)


def test_ray_datas_limit_of_time_without_progress_ends_no_healthy_run(
    cluster, inline: pd.DataFrame, tiny: Recipe, images: Path, model: Path, tmp_path: Path, monkeypatch
) -> None:
    """Half an hour by default, in which Ray Data counts neither running tasks nor the wait for a node as progress."""
    monkeypatch.setattr(ray.data.DataContext.get_current(), "execution_no_progress_timeout_s", 0.5)
    generate_run(tiny, str(images), str(model), str(tmp_path), Request(), Execution(executor="ray", actors=1))
    assert records(tmp_path).equals(inline)


@pytest.mark.parametrize("actors", [1, 2])
def test_any_number_of_actors_gives_the_inline_run(
    actors: int, cluster, inline: pd.DataFrame, tiny: Recipe, images: Path, model: Path, tmp_path: Path
) -> None:
    counts = generate_run(
        tiny, str(images), str(model), str(tmp_path), Request(), Execution(executor="ray", actors=actors)
    )
    assert counts == {"shards": 3, "records": 18, "ok": 18}
    assert records(tmp_path).equals(inline)
    again = generate_run(
        tiny, str(images), str(model), str(tmp_path), Request(), Execution(executor="ray", actors=3 - actors)
    )
    assert again["shards"] == 0


@pytest.mark.parametrize("failures", [1, 4])
def test_actors_that_are_lost_while_they_start_are_replaced(failures: int, cluster, tmp_path: Path) -> None:
    """By default, Ray Data fails at the first one. A start that never succeeds still ends the run."""

    class Unlucky:
        def __init__(self, run: str, *addresses: str) -> None:
            starts = Path(run, "starts")
            with starts.open("a") as file:
                file.write(".")
            if starts.stat().st_size <= failures:
                raise MemoryError("no memory to start in")

        def __call__(self, batch: dict) -> dict:
            return {"shard": [int(batch["shard"][0])]}

    reports: list[dict] = []
    if failures == 4:
        with pytest.raises(Exception, match="no memory to start in"):
            ray_generate.generate(str(tmp_path), "", "", [0, 1, 2], reports.append, 1, worker=Unlucky)
    else:
        ray_generate.generate(str(tmp_path), "", "", [0, 1, 2], reports.append, 1, worker=Unlucky)
        assert sorted(report["shard"] for report in reports) == [0, 1, 2]


def on_one_core() -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def test_a_session_takes_the_cores_it_may_use_and_leaves_the_environment_as_it_was() -> None:
    code = """
import os
from diffva_ray.distributed import session
os.environ["GOMP_SPINCOUNT"] = "5"
before = dict(os.environ)
with session.connect():
    assert session.cpus() == 1
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert os.environ["GOMP_SPINCOUNT"] == "5"
assert {name: value for name, value in os.environ.items() if name in session.ENVIRONMENT} == {
    name: value for name, value in before.items() if name in session.ENVIRONMENT}
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, preexec_fn=on_one_core)


def test_training_on_ray_equals_the_loop(cluster, tiny: Recipe, images: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    assert train_model(tiny, str(images), str(out))
    for part in ("vae", "unet", "text_encoder", "judge"):
        files, expected = (sorted((folder / part).glob("*.safetensors")) for folder in (out, model))
        assert [file.name for file in files] == [file.name for file in expected] != []
        for file in files:
            ours, theirs = (torch.cat([value.flatten().float() for value in load_file(path).values()])
                            for path in (file, model / part / file.name))  # fmt: skip
            # All weights together: Adam makes a full step even if a gradient is zero except for rounding.
            assert (ours - theirs).norm() < 1e-2 * theirs.norm(), part
    card = json.loads((out / "diffva.json").read_text())
    assert card["data_kind"] == "phantoms"
    assert card["code_revision"]

    assert not train_model(tiny, str(images), str(out))
    other = tiny.model_copy(update={"seed": 5})
    with pytest.raises(FingerprintDiffers, match="seed"):
        train_model(other, str(images), str(out))


def test_a_relative_base_is_found_by_the_workers(
    cluster, tiny: Recipe, images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the base of recipe ``cpu`` is: relative to the folder of the command, which Ray Train's workers leave."""
    (tmp_path / "base").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    values = tiny.model_dump(mode="json")
    values["model"] |= {"base": "base", "vae": None, "unet": None, "text": None}
    values["train"]["stages"] = values["train"]["stages"][1:2]
    assert train_model(make_recipe(values), str(images), "model")
    assert json.loads(Path("model/diffva.json").read_text())["recipe"]["model"]["base"] == "base"


def test_two_ray_workers_have_one_workers_losses(cluster, tiny: Recipe, images: Path, tmp_path: Path) -> None:
    """(minimum, maximum) workers on a cluster that has room for both; each takes half of every batch."""
    values = tiny.model_dump(mode="json")
    values["train"] |= {"stages": values["train"]["stages"][1:2], "log_every": 1}
    values["train"]["stages"][0]["learning_rate"] = 2e-4
    recipe = make_recipe(values)
    train_model(recipe, str(images), str(tmp_path / "two"), workers=(1, 2))
    train_model(recipe, str(images), str(tmp_path / "one"), executor="inline")
    two, one = (
        [entry["loss"] for entry in json.loads((tmp_path / name / ".train/progress.json").read_text())["history"]]
        for name in ("two", "one")
    )
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize(("verb", "signals"), [("generate", 1), ("generate", 300), ("train", 1), ("reduce", 1)])
def test_sigterm_ends_a_driver_of_ray_as_ctrl_c_does(
    verb: str, signals: int, tiny: Recipe, images: Path, model: Path, tmp_path: Path
) -> None:
    """Ray's own handler would abort the process (134) with a C++ stack trace."""
    recipe, out = tmp_path / "tiny.yaml", tmp_path / "out"
    recipe.write_text(to_yaml(tiny))
    command = [sys.executable, "-m", "diffva_ray.cli", verb, "--data", images, "--out", out, "--recipe", recipe]
    if verb == "generate":
        command += ["--model", model, "--actors", 1, "--set", "generate.shard_size=1", "--steps", 60]
        begun = "records/*.parquet"
    elif verb == "reduce":
        one_each = make_recipe(tiny.model_dump(mode="json"), ["generate.shard_size=1"])
        generate_run(one_each, str(images), str(model), str(out), Request(), Execution(executor="inline"))
        command, begun = [*command[:3], verb, out], "quarantine.parquet"  # what is written before the workers start
    else:
        command += ["--set", "train.stages.0.steps=4000"]
        begun = ".train/progress.json"
    driver = subprocess.Popen(
        [str(word) for word in command], stderr=subprocess.PIPE, start_new_session=True, preexec_fn=on_one_core
    )
    deadline = time.monotonic() + 300
    while not list(out.glob(begun)) and driver.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for _ in range(signals):
        driver.send_signal(signal.SIGTERM)  # does nothing once the process has ended
        time.sleep(0.1 if driver.poll() is None else 0)
    _, errors = driver.communicate(timeout=120)
    assert not (out / "_SUCCESS").exists()
    assert driver.returncode == 130, errors[-2000:]
    assert errors.decode().rstrip().endswith("interrupted; all committed work is kept; repeat the command to continue")
    assert b"SIGTERM received" not in errors


@pytest.mark.parametrize(
    ("verb", "options", "message"),
    [
        ("generate", ("--gpus-per-actor", "1"), "--gpus-per-actor 1: needs 1 GPU on this machine, where Ray sees no"),
        ("generate", ("--gpus-per-actor", "0.5"), "needs 0.5 GPU"),
        ("train", ("--gpus-per-worker", "1"), "--workers 1 --gpus-per-worker 1: needs 1 GPU"),
        ("train", ("--workers", "64"), "--workers 64: needs 64 CPU on this machine"),
    ],
)
def test_resources_that_a_private_cluster_lacks_are_refused_at_once(
    verb: str, options: tuple[str, str], message: str, images: Path, model: Path, tiny: Recipe, tmp_path: Path
) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(to_yaml(tiny))
    command = [sys.executable, "-m", "diffva_ray.cli", verb, "--data", images, "--out", tmp_path / "out", *options]
    command += (
        ["--model", model] if verb == "generate" else ["--recipe", recipe, "--set", "train.stages.0.batch_size=64"]
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr.splitlines()[-1]


def test_a_killed_driver_costs_no_record(inline: pd.DataFrame, tiny: Recipe, images: Path, model: Path, tmp_path: Path):
    recipe, out = tmp_path / "tiny.yaml", tmp_path / "run"
    recipe.write_text(to_yaml(tiny))
    command = [sys.executable, "-m", "diffva_ray.cli", "generate", "--data", images, "--model", model, "--out", out]
    command = [str(word) for word in [*command, "--recipe", recipe, "--actors", 1, "--set", "generate.shard_size=2"]]
    driver = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 300  # the machine may be busy
    while len(list(out.glob("records/*.parquet"))) < 2 and driver.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert subprocess.run(command, env={**os.environ}, timeout=400).returncode == 0
    run = find_run(LocalStore(str(out)))
    assert run is not None
    assert verify(run) == []
    ours, theirs = (frame.set_index("record_id").sort_index() for frame in (records(out), inline))
    assert ours["counterfactual_sha256"].equals(theirs["counterfactual_sha256"])
    assert ours["attribution_sha256"].equals(theirs["attribution_sha256"])
