"""The plan decides everything before the first image is read, and must not change between versions."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from diffva_ray.config.recipe import Recipe
from diffva_ray.data.datasets import open_dataset
from diffva_ray.generate.keys import pixel_keys
from diffva_ray.generate.plan import Request, make_plan, parse_sweep
from diffva_ray.generate.run import FingerprintDiffers, PlanError, continue_run, find_run, start_run
from diffva_ray.schema import ENGINE
from diffva_ray.storage.local import LocalStore


@pytest.fixture
def dataset(images: Path):
    return open_dataset(images, classes=["COVID", "Lung_Opacity"])


def test_every_image_once_in_even_shards(dataset, tiny: Recipe) -> None:
    rows = make_plan(dataset, tiny, Request()).to_pylist()
    assert sorted(row["image_path"] for row in rows) == [image.path for image in dataset.images]
    assert [(row["shard"], row["position"]) for row in rows] == [(n // 6, n % 6) for n in range(12)]
    assert {row["label"] for row in rows[:6]} == {"COVID", "Lung_Opacity"}  # sorting by id spreads classes over shards
    assert all(row["lesion_mask_path"] and row["ground_truth_path"] for row in rows)


def test_a_sweep_is_one_plan_of_paired_records_in_shards_of_one_setting(dataset, tiny: Recipe) -> None:
    sweep = parse_sweep(["strength=0.4,0.7", "prompt=normal chest scan,healthy"])
    rows = make_plan(dataset, tiny, Request(sweep=sweep)).to_pylist()
    assert len(rows) == 48
    seeds = {row["image_path"]: set() for row in rows}
    for row in rows:
        seeds[row["image_path"]].add(row["seed"])
    assert all(len(found) == 1 for found in seeds.values())
    for shard in {row["shard"] for row in rows}:
        assert len({row["strength"] for row in rows if row["shard"] == shard}) == 1


def test_limit_takes_a_fixed_subset(dataset, tiny: Recipe) -> None:
    few = make_plan(dataset, tiny, Request(limit=5)).to_pylist()
    more = make_plan(dataset, tiny, Request(limit=7)).to_pylist()
    assert len(few) == 5
    assert {row["record_id"] for row in few} <= {row["record_id"] for row in more}


def test_a_limit_takes_the_same_images_with_all_settings(dataset, tiny: Recipe) -> None:
    """Two limited runs can be compared, and a limited sweep has every point of each image."""

    def images_of(request: Request, **settings: float) -> list[str]:
        recipe = tiny.model_copy(update={"generate": tiny.generate.model_copy(update=settings)})
        return sorted(row["image_path"] for row in make_plan(dataset, recipe, request).to_pylist())

    plain = images_of(Request(limit=4))
    assert images_of(Request(limit=4), strength=0.3) == images_of(Request(limit=4, prompt="healthy")) == plain
    assert images_of(Request(limit=8, sweep=parse_sweep(["strength=0.4,0.7"]))) == sorted(plain * 2)


def test_samples_are_records_with_their_own_noise(dataset, tiny: Recipe) -> None:
    recipe = tiny.model_copy(update={"generate": tiny.generate.model_copy(update={"samples": 3})})
    rows = make_plan(dataset, recipe, Request()).to_pylist()
    assert len({row["record_id"] for row in rows}) == len({row["seed"] for row in rows}) == 36


@pytest.mark.parametrize(
    ("texts", "reason"),
    [(["height=3"], "height"), (["strength=a,b"], "numbers"), (["strength"], "key=value")],
)
def test_bad_sweeps_are_named(texts: list[str], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        parse_sweep(texts)


@pytest.mark.parametrize("sweep", ["strength=0.7,1.5", "strength=0.01", "method=ddim-inversion,sdedit"])
def test_settings_that_cannot_run_are_refused_at_planning(sweep: str, dataset, tiny: Recipe) -> None:
    generate = tiny.generate.model_copy(update={"scheduler": "pndm"})
    recipe = tiny.model_copy(update={"generate": generate})
    with pytest.raises(PlanError):
        make_plan(dataset, recipe, Request(sweep=parse_sweep([sweep])))


def run_json(recipe: Recipe) -> dict[str, object]:
    """What a run stores beside its plan."""
    return {"recipe": recipe.model_dump(mode="json"), "data": "/data", "data_root": "/data"}


def keys(recipe: Recipe, request: Request = Request(), model: str = "m", torch: str = "2.0", device: str = "cpu"):
    return pixel_keys(recipe, request, model, torch, device, planned_on="cpu")


def test_a_run_continues_only_as_it_was_planned(dataset, tiny: Recipe, tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    run = start_run(store, make_plan(dataset, tiny, Request()), keys(tiny), run_json(tiny))
    assert run.pending() == [0, 1]
    assert [len(run.planned(shard)) for shard in (0, 1)] == run.shard_sizes() == [6, 6]
    again = find_run(store)
    assert again is not None
    assert again.recipe == tiny
    continue_run(again, keys(tiny))

    other = tiny.model_copy(update={"generate": tiny.generate.model_copy(update={"guidance_scale": 9.0})})
    with pytest.raises(FingerprintDiffers, match=r"guidance_scale: 2\.5 there, 9\.0 now") as caught:
        continue_run(again, keys(other))
    assert caught.value.keys == ["guidance_scale"]
    for changed, name in (
        (keys(tiny, model="another"), "model_digest"),
        (keys(tiny, Request(limit=3)), "limit"),
        (keys(tiny, Request(classes=("COVID",))), "classes"),
        (keys(tiny, Request(prompt="healthy")), "prompt"),
    ):
        with pytest.raises(FingerprintDiffers, match=name):
            continue_run(again, changed, allow_environment_change=True)


def test_a_later_setting_has_its_default(dataset, tiny: Recipe, tmp_path: Path) -> None:
    earlier = {key: value for key, value in keys(tiny).items() if key != "compile"}
    table, about = make_plan(dataset, tiny, Request()), run_json(tiny)
    run = start_run(LocalStore(str(tmp_path)), table, earlier, about)
    assert continue_run(run, keys(tiny)) is run
    other = tiny.model_copy(update={"generate": tiny.generate.model_copy(update={"compile": True})})
    with pytest.raises(FingerprintDiffers, match="compile: False there, True now"):
        continue_run(run, keys(other))


def test_threads_read_shards_in_parallel(dataset, tiny: Recipe, tmp_path: Path) -> None:
    """As ``verify`` does. A ParquetFile that threads share gives wrong rows or crashes the process."""
    recipe = tiny.model_copy(update={"generate": tiny.generate.model_copy(update={"shard_size": 1})})
    table = make_plan(dataset, recipe, Request())
    run = start_run(LocalStore(str(tmp_path)), table, keys(recipe), run_json(recipe))
    assert run.shards == len(table)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            found = pool.map(run.planned, range(run.shards))
            assert [row["record_id"] for rows in found for row in rows] == table["record_id"].to_pylist()


def test_another_environment_may_be_allowed_and_is_recorded(dataset, tiny: Recipe, tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    about = run_json(tiny)
    run = start_run(store, make_plan(dataset, tiny, Request()), keys(tiny), about)
    moved = keys(tiny, torch="2.1", device="cuda")
    with pytest.raises(FingerprintDiffers, match="--allow-environment-change"):
        continue_run(run, moved)
    forced = continue_run(run, moved, allow_environment_change=True)
    assert forced.fingerprint == run.fingerprint
    reread = find_run(store)
    assert reread is not None
    assert reread.about["environment_changes"] == [{"torch": "2.1", "device": "cuda", "engine": ENGINE}]


def test_a_replaced_plan_is_detected(dataset, tiny: Recipe, tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    start_run(store, make_plan(dataset, tiny, Request()), keys(tiny), run_json(tiny))
    other = LocalStore(str(tmp_path / "other"))
    start_run(other, make_plan(dataset, tiny, Request(limit=3)), keys(tiny), run_json(tiny))
    store.put("plan.parquet", other.read("plan.parquet"))
    run = find_run(store)
    assert run is not None
    with pytest.raises(PlanError, match=r"plan\.parquet"):
        run.plan()


class Counting(LocalStore):
    """Counts the bytes that are read."""

    bytes = 0

    def read(self, path: str) -> bytes:
        data = super().read(path)
        self.bytes += len(data)
        return data

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        data = super().read_range(path, start, stop)
        self.bytes += len(data)
        return data


@pytest.mark.parametrize("row_groups", [3, 400])
def test_a_worker_reads_its_shards_and_not_the_plan(
    row_groups: int, dataset, tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when there are too many shards for one row group each."""
    monkeypatch.setattr("diffva_ray.generate.run.MAX_ROW_GROUPS", row_groups)
    recipe = tiny.model_copy(update={"generate": tiny.generate.model_copy(update={"samples": 400, "shard_size": 64})})
    table = make_plan(dataset, recipe, Request())
    start_run(LocalStore(str(tmp_path)), table, keys(recipe), run_json(recipe))
    store = Counting(str(tmp_path))
    run = find_run(store)
    assert run is not None
    store.bytes = 0
    rows = run.planned(40)
    assert store.bytes < (tmp_path / "plan.parquet").stat().st_size * (0.6 if row_groups == 3 else 0.35)
    assert rows == table.slice(40 * 64, 64).to_pylist()
    assert run.shard_sizes() == [64] * 75
    assert run.plan().to_pylist() == table.to_pylist()


def test_a_replaced_plan_is_detected_when_a_shard_is_read(dataset, tiny: Recipe, tmp_path: Path) -> None:
    store, other = LocalStore(str(tmp_path)), LocalStore(str(tmp_path / "other"))
    run = start_run(store, make_plan(dataset, tiny, Request()), keys(tiny), run_json(tiny))
    reseeded = tiny.model_copy(update={"generate": tiny.generate.model_copy(update={"guidance_scale": 9.0})})
    start_run(other, make_plan(dataset, reseeded, Request()), keys(tiny), run_json(tiny))
    store.put("plan.parquet", other.read("plan.parquet"))
    with pytest.raises(PlanError, match=r"plan\.parquet"):
        run.planned(0)
