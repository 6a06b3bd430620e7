"""A sample of the chaos suite (`make chaos` runs a thousand and fifty of them): no record may differ."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from histories import Bench

from diffva_ray.evaluate.records import read_records
from diffva_ray.generate.plan import Request
from diffva_ray.generate.run import find_run
from diffva_ray.generate.shard import run_shard
from diffva_ray.generate.worker import WorkerContext
from diffva_ray.storage.local import LocalStore
from diffva_ray.workflows.execution import Execution
from diffva_ray.workflows.generate import generate_run


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("chaos"))


def test_ten_inline_histories(bench: Bench) -> None:
    faults = 0
    for seed in range(10):
        counts, differing, _ = bench.history(seed)
        assert not differing, f"seed {seed}"
        faults += counts["kills"] + counts["failures"]
    assert faults > 20  # otherwise nothing was tested


def test_a_history_on_a_cluster(bench: Bench) -> None:
    from cluster import ClusterBench

    cluster = ClusterBench(bench)
    try:
        _, differing, _ = cluster.history(0)
        assert not differing
    finally:
        cluster.close()


def test_the_order_of_shards_changes_nothing(bench: Bench, tmp_path: Path) -> None:
    first = bench.folder / "undisturbed"
    generate_run(bench.recipe, bench.data, bench.model, str(tmp_path), Request(), Execution(executor="inline"))
    run = find_run(LocalStore(str(tmp_path)))
    assert run is not None
    for shard in range(run.shards):
        run.store.delete(f"records/part-{shard:05d}.parquet")
    order = list(range(run.shards))
    random.Random(1).shuffle(order)
    context = WorkerContext.open(run.store.uri, bench.data, bench.model)
    for shard in order:
        run_shard(context, shard)
    undisturbed = find_run(LocalStore(str(first)))
    assert undisturbed is not None
    assert read_records(run).equals(read_records(undisturbed))


def test_histories_of_several_drivers(bench: Bench) -> None:
    from drivers import CrowdBench

    crowd, counts = CrowdBench(bench), Counter[str]()
    for seed in range(3):
        of_one, differing, _ = crowd.history(seed)
        assert not differing, f"seed {seed}"
        counts += of_one
    assert counts["pauses"] > 3
    assert counts["kills"] > 3
    assert counts["replaced images"] > 3
