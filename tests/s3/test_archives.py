"""Images inside Parquet files and tar archives in a bucket: only the parts that are needed are fetched."""

from __future__ import annotations

import json
import tarfile
import time
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from diffva_ray.cli import main
from diffva_ray.data.datasets import open_dataset
from diffva_ray.evaluate.records import read_records
from diffva_ray.generate.run import open_run
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import Modified


@pytest.fixture
def packed(bucket: str, images: Path) -> str:
    """A bucket with four images in a Parquet file, two of them also in a tar."""
    files = [path for name in ("Normal", "COVID") for path in sorted((images / name / "images").iterdir())[:2]]
    parquet, tar = BytesIO(), BytesIO()
    table = {"image": [{"bytes": path.read_bytes(), "path": path.name} for path in files],
             "label": [path.parts[-3] for path in files]}  # fmt: skip
    pq.write_table(pa.table(table), parquet, row_group_size=1)
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for path in files[:2]:
            for name, data in ((path.name, path.read_bytes()), (f"{path.stem}.cls", path.parts[-3].encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, BytesIO(data))
    open_store(f"{bucket}/hub").put("data/test-00000-of-00001.parquet", parquet.getvalue())
    open_store(f"{bucket}/shards").put("000.tar", tar.getvalue())
    return bucket


def test_a_run_on_packed_images_in_a_bucket(packed: str, model: Path, images: Path) -> None:
    words = ["--model", str(model), "--executor", "inline", "--classes", "COVID"]
    result = CliRunner().invoke(main, ["generate", "--data", f"{packed}/hub", "--out", f"{packed}/run", *words])
    assert result.exit_code == 0, result.output
    records = read_records(open_run(f"{packed}/run"))
    assert records["status"].tolist() == ["ok"] * 2
    assert set(records["split"]) == {"test"}
    image = f"{packed}/hub/{records['image_path'][0]}"
    assert json.loads(CliRunner().invoke(main, ["inspect", image, "--json"]).output)["sizes"] == {"32x32": 1}


def test_members_are_ranges_of_the_archive(packed: str, images: Path) -> None:
    dataset = open_dataset(f"{packed}/shards")
    assert dataset.classes == {"Normal": 2}
    store, first = dataset.store, dataset.images[0]
    original = (images / "Normal" / "images" / first.path.removeprefix("000.tar/")).read_bytes()
    assert store.read(first.path, time.time() + 60) == original
    with pytest.raises(Modified):
        store.read(first.path, time.time() - 3600)
