"""Images inside Parquet files and tar archives: read without unpacking, with columns and the names of classes."""

from __future__ import annotations

import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import replicas
from click.testing import CliRunner, Result

from diffva_ray.cli import main
from diffva_ray.config.recipe import DataConfig
from diffva_ray.data.columns import patient_key
from diffva_ray.data.dataset import UnusableData
from diffva_ray.data.datasets import open_dataset
from diffva_ray.evaluate.records import read_records
from diffva_ray.generate.run import open_run
from diffva_ray.storage import archives
from diffva_ray.storage.local import LocalStore
from diffva_ray.storage.opening import open_file, open_store
from diffva_ray.storage.store import Modified, StoreError


def diffva(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def unusable(uri: Path, config: DataConfig = DataConfig()) -> str:
    with pytest.raises(UnusableData) as caught:
        open_dataset(uri, config)
    return str(caught.value)


def test_parquet_files_of_hugging_face(tmp_path: Path) -> None:
    replicas.parquet(tmp_path / "data" / "train-00000-of-00002.parquet", age=[40.0, 41, 42, 43])
    replicas.parquet(tmp_path / "data" / "train-00001-of-00002.parquet", first=4, age=[50.0, 51, 52, None])
    replicas.parquet(tmp_path / "data" / "test-00000-of-00001.parquet", first=8, count=2, age=[60, 61])
    (tmp_path / "README.md").write_text("---")
    dataset = open_dataset(tmp_path)
    assert dataset.kind == "parquet-images"
    assert dataset.classes == {"COVID": 5, "Normal": 5}
    assert [image.path for image in dataset.images][2:6] == [
        *(f"data/train-00000-of-00002.parquet/image/00000{n}.{end}" for n, end in enumerate(("png", "jpg") * 2))
    ]
    first = dataset.images[2]
    assert (first.patient, dict(first.columns)) == (patient_key("P0"), {"age": "40", "split": "train"})
    assert [dataset.store.read(image.path) for image in dataset.images[2:6]] == [
        replicas.encoded(n, "JPEG" if n % 2 else "PNG") for n in range(4)
    ]
    assert [image.size for image in dataset.images] == [len(dataset.store.read(i.path)) for i in dataset.images]
    assert not dataset.left_out
    # one file of it
    one = open_dataset(tmp_path / "data" / "test-00000-of-00001.parquet")
    assert [image.path for image in one.images] == [f"test-00000-of-00001.parquet/image/00000{n}.{end}"
                                                    for n, end in enumerate(("png", "jpg"))]  # fmt: skip


def test_lists_of_classes_absent_labels_and_damaged_images(tmp_path: Path) -> None:
    names = {"feature": {"names": ["No Finding", "Edema", "Mass"], "_type": "ClassLabel"}, "_type": "Sequence"}
    table = pa.table({
        "scan": [replicas.encoded(0), b"damaged", None, replicas.encoded(3), replicas.encoded(4)],
        "embedding": [b"1234"] * 5,
        "findings": [[1, 2], [0], [0], [-1], None],
        "mask": [None, {"bytes": replicas.encoded(5), "path": None}, None, None, None],
    })  # fmt: skip
    metadata = {"huggingface": json.dumps({"info": {"features": {"findings": names}}})}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "all.parquet")
    config = DataConfig(columns={"image": "scan"})
    dataset = open_dataset(tmp_path, config)
    assert [(image.path, image.label) for image in dataset.images] == [
        ("all.parquet/scan/000000.png", "Edema"), ("all.parquet/scan/000000.png", "Mass"),
        ("all.parquet/scan/000001.damaged", "Normal"),
    ]  # fmt: skip
    assert dataset.images[2].lung_mask == "all.parquet/mask/000001.png"
    assert "1 rows of all.parquet without a path" in dataset.left_out
    assert "2 rows of all.parquet without a label" in dataset.left_out
    assert "1 columns of all.parquet that are neither text nor numbers (embedding)" in dataset.left_out
    (bad,) = json.loads(diffva("inspect", tmp_path, "--columns", "image=scan", "--json").output)["unreadable"]
    assert bad["status"] == "bad_image"
    assert "embedding (data.columns) has no images; these have: mask, scan" in unusable(
        tmp_path, DataConfig(columns={"image": "embedding"})
    )


def test_without_a_column_of_labels_the_columns_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [replicas.encoded(0)], "kind": ["x"]}), tmp_path / "all.parquet")
    assert "--columns label=NAME (there are kind)" in unusable(tmp_path)
    assert open_dataset(tmp_path, DataConfig(columns={"label": "kind"})).classes == {"x": 1}


def test_tables_of_a_run_are_no_images(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["a"], "hash": [b"1234"]}), tmp_path / "metadata.parquet")
    assert "1 .parquet files: no column of images" in unusable(tmp_path)
    replicas.image(tmp_path, "Normal/0.png", "COVID/1.png")
    assert open_dataset(tmp_path).left_out == []
    replicas.parquet(tmp_path / "metadata.parquet")
    assert "1 Parquet files with images; give their folder, or one of them" in open_dataset(tmp_path).left_out
    assert len(open_dataset(tmp_path / "metadata.parquet")) == 4


def test_web_dataset(tmp_path: Path) -> None:
    replicas.webdataset(tmp_path)
    dataset = open_dataset(tmp_path)
    assert dataset.kind == "webdataset"
    assert dataset.classes == {"COVID": 2, "Normal": 2}
    assert [image.path for image in dataset.images] == [
        f"{shard}.tar/{key}.png" for shard, keys in (("test-001", ("10", "11")), ("train-000", ("00", "01")))
        for key in keys
    ]  # fmt: skip
    assert dataset.images[3].patient == patient_key("P0")
    assert dataset.images[3].columns["split"] == "train"
    assert dataset.images[3].lesion_mask == "train-000.tar/01.lesion.png"
    assert dataset.store.read("test-001.tar/11.png") == replicas.encoded(3)
    assert dataset.store.read_range("test-001.tar/11.png", 1, 4) == b"PNG"
    assert dataset.left_out == []
    assert len(open_dataset(tmp_path / "test-001.tar")) == 2


def test_labels_of_web_datasets(tmp_path: Path) -> None:
    one, two, three, mask = map(replicas.encoded, range(4))
    replicas.tar(tmp_path / "a.tar", {"1.png": one, "1.cls": "3", "1.txt": "a  caption", "1.mask.png": mask})
    replicas.tar(
        tmp_path / "b.tar",
        {"Edema/2.img.png": two, "Edema/2.txt": "words", "./3.png": three, "3.txt": "Mass"},
    )
    found = {image.path: image for image in open_dataset(tmp_path).images}
    assert {path: (image.label, image.caption) for path, image in found.items()} == {
        "a.tar/1.png": ("3", "a caption"), "b.tar/Edema/2.img.png": ("Edema", "words"), "b.tar/3.png": ("Mass", ""),
    }  # fmt: skip
    assert found["a.tar/1.png"].lung_mask == "a.tar/1.mask.png"


def test_other_layouts_inside_tar_archives(tmp_path: Path) -> None:
    replicas.radiography(tmp_path / "plain")
    expected = open_dataset(tmp_path / "plain")
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "all.tar", "w") as archive:
        archive.add(tmp_path / "plain" / "COVID-19_Radiography_Dataset", ".")
    dataset = open_dataset(tmp_path / "tars")
    assert dataset.classes == expected.classes
    assert sum(bool(image.lung_mask) for image in dataset.images) == sum(bool(i.lung_mask) for i in expected.images) > 0


def test_unusable_archives_say_why(tmp_path: Path) -> None:
    (tmp_path / "shard-000.tar").write_bytes(b"x" * 1024)
    assert "shard-000.tar: no tar archive" in unusable(tmp_path)
    replicas.tar(tmp_path / "shard-000.tar", {"1.png": replicas.encoded(0)})
    assert "shard-000.tar/1.png has no label" in unusable(tmp_path)
    whole = (tmp_path / "shard-000.tar").read_bytes()
    (tmp_path / "shard-000.tar").write_bytes(whole[:700])
    assert "damaged" in unusable(tmp_path)
    replicas.tar(tmp_path / "shard-000.tar", {"1.png": replicas.encoded(0), "1.json": "{"})
    assert "shard-000.tar/1.json: not JSON" in unusable(tmp_path)
    replicas.tar(tmp_path / "shard-000.tar", {"notes.md": "x"})
    assert "1 .tar files: no images in them" in unusable(tmp_path)


@pytest.mark.parametrize("make", [lambda root: replicas.parquet(root / "train.parquet"), replicas.webdataset])
def test_a_run_on_packed_images(make: Any, model: Path, tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    make(data)
    command = ("generate", "--data", data, "--model", model, "--out", run, "--executor", "inline", "--classes", "COVID")
    assert "kind" in json.loads(diffva("inspect", data, "--json").output)
    assert (result := diffva(*command)).exit_code == 0, result.output
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert diffva(*command).exit_code == 0
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert (result := diffva("reduce", run, "--executor", "inline")).exit_code == 0, result.output
    assert (result := diffva("report", run)).exit_code == 0, result.output
    assert (result := diffva("verify", run)).exit_code == 0, result.output
    records = read_records(open_run(str(run)))
    assert records["status"].tolist() == ["ok"] * 2
    assert records["patient"].all()
    assert open_run(str(run)).about["data_root"] == f"archives://{data}"
    sheet = tmp_path / "sheet.png"
    image = f"{data}/{records['image_path'][0]}"
    assert (result := diffva("explain", image, "--model", model, "--out", sheet)).exit_code == 0, result.output


def test_an_archive_that_was_written_since_is_noticed(tmp_path: Path) -> None:
    replicas.parquet(tmp_path / "a.parquet")
    replicas.tar(tmp_path / "b.tar", {"1.png": replicas.encoded(0)})
    store = open_store(f"archives://{tmp_path}")
    since = os.stat(tmp_path / "a.parquet").st_mtime - 10
    for path in ("a.parquet/image/000000.png", "b.tar/1.png"):
        assert store.read(path, since + 60)
        with pytest.raises(Modified):
            store.read(path, since)


def test_the_store_is_opened_by_address_in_another_process(tmp_path: Path) -> None:
    replicas.parquet(tmp_path / "x.parquet" / "part.parquet")  # Spark gives folders such names
    store = pickle.loads(pickle.dumps(open_store(f"archives://{tmp_path}")))
    path = "x.parquet/part.parquet/image/000003.jpg"
    assert store.read(path) == replicas.encoded(3, "JPEG")
    assert store.exists(path)
    for absent in ("x.parquet/part.parquet/image/000004.jpg", "x.parquet/part.parquet/image/000003.png",
                   "x.parquet/part.parquet/label/000000.png", "x.parquet/part.parquet/image/x.jpg"):  # fmt: skip
        assert not store.exists(absent)
        with pytest.raises(FileNotFoundError):
            store.read(absent)
    with pytest.raises(StoreError, match="read-only"):
        store.put(path, b"")
    opened, name = open_file(f"{tmp_path}/{path}")
    assert opened.read(name) == replicas.encoded(3, "JPEG")


def test_memory_is_bounded_by_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 64 MB in row groups of 2 MB is listed and read with a few of them in memory."""
    monkeypatch.setattr(archives, "KEPT_BYTES", 8 << 20)
    rng = np.random.default_rng(0)
    rows = [b"\x89PNG" + rng.bytes(1 << 18) for _ in range(256)]
    pq.write_table(pa.table({"image": rows, "label": ["a"] * 256}), tmp_path / "big.parquet", row_group_size=8)
    start, sizes = pa.total_allocated_bytes(), []

    class Watched(LocalStore):
        def read_range(self, path: str, start: int, stop: int, unmodified_since: float | None = None) -> bytes:
            sizes.append(pa.total_allocated_bytes())
            return super().read_range(path, start, stop, unmodified_since)

    store = archives.ArchiveStore(Watched(str(tmp_path)))
    entries = [entry for entry in store.list() if entry.path.endswith(".png")]
    assert [entry.size for entry in entries] == [len(row) for row in rows]
    assert all(store.read(entries[n].path) == rows[n] for n in (0, 250, 100, *range(0, 256, 7)))
    assert max(sizes) - start < 16 << 20
    # neighbouring rows are read at once
    sizes.clear()
    assert store.read(entries[128].path) == rows[128]
    first = len(sizes)
    assert first > 0
    assert all(store.read(entries[n].path) == rows[n] for n in range(129, 136))
    assert len(sizes) == first
