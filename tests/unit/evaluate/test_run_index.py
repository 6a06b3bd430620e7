"""The index of a run: columns of all records, and whole rows of a few."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffva_ray.config.recipe import Recipe
from diffva_ray.config.sampling import SWEEPABLE
from diffva_ray.data.shapes import Box
from diffva_ray.evaluate import run_index as module
from diffva_ray.evaluate.records import read_records, stored_records
from diffva_ray.evaluate.run_index import index_run
from diffva_ray.generate.plan import Request
from diffva_ray.generate.run import Run, open_run
from diffva_ray.workflows.execution import Execution
from diffva_ray.workflows.generate import generate_run

MakeRun = Callable[..., Run]


def test_the_frame_has_the_records(make_run: MakeRun) -> None:
    run = make_run(bad={"05": "cannot be decoded", "08": "cannot be decoded"})
    found, records = index_run(run), read_records(run)
    good = records[records["status"] == "ok"].reset_index(drop=True)
    bad = records[records["status"] != "ok"]
    assert found.quarantined["record_id"].to_pylist() == bad["record_id"].tolist()
    assert found.quarantined["error"].to_pylist() == ["cannot be decoded"] * 2
    assert [record.decode() for record in found.ids] == good["record_id"].tolist()
    assert found.paths(np.arange(len(good))) == good["image_path"].tolist()
    assert found.images.to_pylist() == sorted(good["image_path"])
    assert found.frame["label"].tolist() == good["label"].tolist()
    for name in module.NUMBERS:
        np.testing.assert_array_equal(found.frame[name], good[name].astype(float), err_msg=name)
    assert "setting" not in found.frame
    assert found.truth == [(0, 0), (0, 1), (0, 2)]
    for shard_ref, rows in found.shards_of.items():
        assert [row["record_id"].encode() for row in stored_records(run, shard_ref)] == found.ids[rows].tolist()


def test_an_unfinished_run_has_its_committed_records(make_run: MakeRun) -> None:
    run = make_run(shards=1)
    assert len(index_run(run).frame) == len(index_run(run).ids) == 4
    run.store.delete("records/part-00000.parquet")
    empty = index_run(run)
    assert (len(empty.frame), len(empty.images), empty.truth, empty.sampled) == (0, 0, [], [])


def test_requested_images_and_training_images(make_run: MakeRun) -> None:
    run = make_run()
    path = read_records(run)["image_path"][7]
    found = index_run(run, requested={path}, trained_on=lambda sha256: sha256 is None)
    assert [row["image_path"] for row in found.requested] == [path]
    assert found.frame["trained_on"].all()  # these records have no digest
    assert "trained_on" not in index_run(run).frame


def test_shards_without_ground_truth_are_not_scored(make_run: MakeRun) -> None:
    run = make_run()
    path = "records/part-00001.parquet"
    table = pq.read_table(io.BytesIO(run.store.read(path)))
    for name in ("lesion_mask_path", "ground_truth_path"):
        table = table.set_column(table.column_names.index(name), name, pa.array([""] * len(table)))
    sink = io.BytesIO()
    pq.write_table(table, sink)
    run.store.put(path, sink.getvalue())
    assert index_run(run).truth == [(0, 0), (0, 2)]
    boxed = table["image_path"][2].as_py()
    assert index_run(run, lesions={boxed: [Box(w=2, h=2)]}).truth == [(0, 0), (0, 1), (0, 2)]


@pytest.fixture(scope="module")
def swept(tiny: Recipe, images: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("index_run") / "run"
    request = Request(sweep=(("strength", (0.3, 0.6)), ("prompt", ("normal chest scan", "COVID 19"))))
    generate_run(tiny, str(images), str(model), str(out), request, Execution(executor="inline"))
    return open_run(str(out))


def test_settings_of_a_sweep_have_names(swept: Run) -> None:
    found, records = index_run(swept), read_records(swept)
    names = [found.settings[tuple(row)] for row in records[list(SWEEPABLE)].itertuples(index=False)]
    assert found.frame["setting"].tolist() == names
    assert len(set(names)) == 4
    assert "strength 0.3, “COVID 19”" in names


def test_the_same_images_are_sampled_in_every_setting(swept: Run) -> None:
    few, more = index_run(swept, max_images=2).sampled, index_run(swept, max_images=4).sampled
    order = read_records(swept)["record_id"].tolist()
    localization = [order.index(row["record_id"]) for row in more]
    assert localization == sorted(localization)
    assert {row["record_id"] for row in few} < {row["record_id"] for row in more}
    images = {setting: {row["image_path"] for row in few if row["setting"] == setting} for setting in
             {row["setting"] for row in few}}  # fmt: skip
    assert len(images) == 4
    assert len({frozenset(paths) for paths in images.values()}) == 1
    labels = {row["label"] for row in few}
    assert len(few) == 4 * 2 * len(labels)
