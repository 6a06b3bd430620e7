"""Rows of the distance table: their content, and the images they are computed from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffva_ray.config.recipe import Recipe
from diffva_ray.data.datasets import open_dataset
from diffva_ray.evaluate import distances
from diffva_ray.evaluate.distances import distance_row, reference_features
from diffva_ray.evaluate.reduction import Options, reduce_run
from diffva_ray.generate.plan import Request
from diffva_ray.generate.run import open_run
from diffva_ray.metrics.feature_set import release
from diffva_ray.metrics.features import stand_in
from diffva_ray.metrics.fid import frechet_distance_features
from diffva_ray.storage.local import LocalStore
from diffva_ray.workflows.execution import Execution
from diffva_ray.workflows.generate import generate_run


def test_a_row_has_its_controls_if_the_sets_are_large_enough() -> None:
    x, y = np.random.default_rng(0).standard_normal((2, 30, 64)).astype(np.float32)
    extractor = stand_in()
    row = distance_row("a", "b", x, y, extractor, 10, paired=True)
    assert row is not None
    assert row["value"] == pytest.approx(frechet_distance_features(x, y))
    assert row["halves"]["n"] == 15
    assert row["manifold"]["k"] == 5
    assert not row["infinity"]["trusted"]  # 15 images in 64 dimensions
    assert (row["dimension"], row["is_stand_in"]) == (64, True)
    assert row["interval"] is None  # 30 images in 64 dimensions: it would cover nothing
    many = np.random.default_rng(1).standard_normal((2, 80, 64)).astype(np.float32)
    low, high = distance_row("a", "b", *many, extractor, 10)["interval"]
    assert low <= high
    assert "halves" not in distance_row("a", "b", x, y, extractor, 10)
    small = distance_row("a", "b", x[:5], y[:5], extractor, 10, paired=True)
    assert not {"halves", "manifold", "infinity"} & small.keys()
    assert distance_row("a", "b", x[:3], y, extractor, 10) is None


class Counting:
    """The random-feature extractor, counting its images."""

    def __init__(self) -> None:
        self.extractor, self.images = stand_in(), 0

    def __getattr__(self, name: str):
        return getattr(self.extractor, name)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.images += len(images)
        return self.extractor(images)


def test_a_reference_set_is_embedded_once_for_all_runs(images: Path, tmp_path: Path) -> None:
    """Other images or another grid are another set; a damaged cache is computed again."""
    dataset, cache, counting = open_dataset(str(images), classes=["Normal"]), LocalStore(str(tmp_path)), Counting()
    first, unreadable = reference_features(cache, 32, dataset.store, dataset.images, counting)
    again, _ = reference_features(cache, 32, dataset.store, dataset.images, counting)
    assert (counting.images, unreadable) == (6, 0)
    np.testing.assert_array_equal(first.load(), again.load())
    reference_features(cache, 32, dataset.store, dataset.images[:4], counting)
    reference_features(cache, 16, dataset.store, dataset.images, counting)
    assert counting.images == 6 + 4 + 6
    for entry in cache.list():
        cache.put(entry.path, b"torn")
    reference_features(cache, 32, dataset.store, dataset.images, counting)
    assert counting.images == 22


def test_features_on_disk_give_the_same_tables(
    tiny: Recipe, images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate_run(tiny, str(images), str(model), str(tmp_path / "run"), Request(), Execution(executor="inline"))
    run = open_run(str(tmp_path / "run"))
    found = []
    for limit in (distances.MAX_NUMBERS_IN_MEMORY, 0):
        monkeypatch.setattr(distances, "MAX_NUMBERS_IN_MEMORY", limit)
        assert isinstance(distances.scratch(2, 3), np.memmap) == (limit == 0)
        run.store.delete("_SUCCESS")
        metrics = reduce_run(run, str(images), Options()).metrics
        found.append((metrics["fid"], metrics["fid_within"]))
    assert found[0] == found[1]
    matrix = distances.scratch(1000, 64)
    matrix[:] = 7
    release(matrix)
    assert (matrix == 7).all()


def test_prompts_of_a_sweep_have_their_own_rows(tiny: Recipe, images: Path, model: Path, tmp_path: Path) -> None:
    """Counterfactuals of two prompts are two sets; their pooled distance would have no meaning."""
    request = Request(("COVID",), sweep=(("prompt", ("normal chest scan", "COVID 19")),))
    generate_run(tiny, str(images), str(model), str(tmp_path / "run"), request, Execution(executor="inline"))
    run = open_run(str(tmp_path / "run"))
    rows = reduce_run(run, str(images), Options(cache=str(tmp_path / "cache"))).metrics["fid"]
    names = {row["set2"] for row in rows if row["set1"] == "COVID (source)"}
    assert names == {"COVID (counterfactual) under “COVID 19”", "COVID (counterfactual) under “normal chest scan”"}
    assert {row["n1"] for row in rows} == {row["n2"] for row in rows} == {6}
    assert list((tmp_path / "cache").rglob("reference-*.npz"))
    assert not list((tmp_path / "run").rglob("reference-*.npz"))
