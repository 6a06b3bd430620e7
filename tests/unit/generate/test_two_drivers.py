"""Two processes plan one run at the same time: one claims it, and the other does not change it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from diffva_ray.config.recipe import Recipe
from diffva_ray.data.datasets import open_dataset
from diffva_ray.generate.keys import pixel_keys
from diffva_ray.generate.plan import Request, make_plan
from diffva_ray.generate.run import FingerprintDiffers, PlanError, Run, find_run, start_run
from diffva_ray.generate.verification import verify
from diffva_ray.schema import record_seed
from diffva_ray.storage.local import LocalStore
from diffva_ray.storage.store import StoreError


def planned(images: Path, recipe: Recipe, store: LocalStore, limit: int | None = None) -> Run:
    """Plan a run like a driver that found none at the address."""
    dataset, request = open_dataset(images), Request(limit=limit)
    keys = pixel_keys(recipe, request, "m", "2.0", "cpu")
    return start_run(store, make_plan(dataset, recipe, request), keys, {"recipe": recipe.model_dump(mode="json")})


def files(store: LocalStore) -> dict[str, bytes]:
    return {path: store.read(path) for path, _ in store.list()}


def test_the_second_driver_gets_the_difference_and_changes_nothing(images: Path, tiny: Recipe, tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path / "run"))
    first = planned(images, tiny, store)
    before = files(store)
    with pytest.raises(FingerprintDiffers, match="seed: 0 there, 5 now"):
        planned(images, tiny.model_copy(update={"seed": 5}), store)
    assert files(store) == before
    assert [row["seed"] for row in first.plan().to_pylist()] == [
        record_seed(tiny.seed, row["image_path"], 0) for row in first.plan().to_pylist()
    ]
    assert planned(images, tiny, store).about == first.about, "of the same settings, it goes on"


class Dying(LocalStore):
    """Kills the driver between the claim and the plan."""

    def put_if_absent(self, path: str, data: bytes) -> bool:
        if path == "plan.parquet":
            raise StoreError("killed here")
        return super().put_if_absent(path, data)


def test_a_claim_without_its_plan_is_completed_by_the_same_command_only(
    images: Path, tiny: Recipe, tmp_path: Path
) -> None:
    store = LocalStore(str(tmp_path / "run"))
    with pytest.raises(StoreError):
        planned(images, tiny, Dying(str(tmp_path / "run")))
    claimed = find_run(store)
    assert claimed is not None
    with pytest.raises(PlanError, match=r"plan\.parquet is missing; give the run's own"):
        claimed.shard_sizes()
    with pytest.raises(FingerprintDiffers):
        planned(images, tiny.model_copy(update={"seed": 5}), store)
    with pytest.raises(PlanError, match="the images have changed since"):
        start_run(
            store, make_plan(open_dataset(images, classes=["COVID"]), tiny, Request()), claimed.keys,
            {"recipe": tiny.model_dump(mode="json")},
        )  # fmt: skip
    assert [path for path, _ in store.list()] == ["run.json"]
    run = planned(images, tiny, store)
    assert sum(run.shard_sizes()) == 24


def test_the_plan_of_another_seed_is_detected_by_its_footer(images: Path, tiny: Recipe, tmp_path: Path) -> None:
    """Images, ids and length are equal; only the fingerprint in the footer differs."""
    stores = [LocalStore(str(tmp_path / name)) for name in "ab"]
    run, _ = (planned(images, tiny.model_copy(update={"seed": seed}), store) for seed, store in enumerate(stores))
    stores[0].put("plan.parquet", stores[1].read("plan.parquet"))
    with pytest.raises(PlanError, match="not the plan"):
        run.planned(0)


def test_two_commands_at_once(images: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "diffva_ray.cli", "generate", "--data", images, "--model", model, "--out", out]
    command += ["--executor", "inline", "--set", "generate.num_inference_steps=4", "--seed"]
    drivers = [
        subprocess.Popen([*map(str, command), str(seed)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for seed in (1, 2)
    ]
    said = [driver.communicate(timeout=300)[0] for driver in drivers]
    codes = [driver.returncode for driver in drivers]
    assert sorted(codes) == [0, 3], said
    seed = codes.index(0) + 1
    run = find_run(LocalStore(str(out)))
    assert run is not None
    assert run.keys["seed"] == seed
    assert verify(run) == []
    frame = pd.read_parquet(out / "records")
    assert frame["seed"].tolist() == [record_seed(seed, path, 0) for path in frame["image_path"]]
    assert f"seed: {seed} there, {3 - seed} now" in said[2 - seed]
