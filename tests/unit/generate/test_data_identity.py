"""Another data set is refused and a missing one is an error; neither becomes rows of the run."""

from __future__ import annotations

import json
import os
import shutil
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from diffva_ray.cli import main
from diffva_ray.data.phantoms import phantom_set
from diffva_ray.evaluate.records import as_records, read_records, read_truth
from diffva_ray.generate import data_identity, shard
from diffva_ray.generate.run import open_run
from diffva_ray.generate.verification import verify
from diffva_ray.storage import store as storage
from diffva_ray.storage.local import LocalStore


def diffva(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def generate(data: Path, model: Path, out: Path, *more: object) -> Result:
    return diffva("generate", "--data", data, "--model", model, "--out", out, "--executor", "inline",
                  "--set", "generate.shard_size=3", *more)  # fmt: skip


def rows(out: Path) -> pd.DataFrame:
    return pd.read_parquet(out / "records").sort_values("record_id").reset_index(drop=True)


@pytest.fixture(scope="module")
def undisturbed(images: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert generate(images, model, out).exit_code == 0
    return rows(out)


@pytest.fixture
def interrupted(images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A data set, and a run on it that was stopped after one shard."""
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(images, data)
    whole = shard.run_shard

    def stop(bench: shard.WorkerContext, number: int) -> dict:
        if number == 1:
            raise KeyboardInterrupt
        return whole(bench, number)

    with monkeypatch.context() as patch:
        patch.setattr(shard, "run_shard", stop)
        assert generate(data, model, out).exit_code == 130
    assert len(open_run(str(out)).done()) == 1
    return data, out


def test_another_data_set_with_the_same_names_is_refused(
    interrupted: tuple[Path, Path], model: Path, tmp_path: Path, undisturbed: pd.DataFrame
) -> None:
    data, out = interrupted
    other = tmp_path / "other"
    for _ in phantom_set(LocalStore(str(other)), 24, 32, seed=99):
        pass
    before = rows(out)
    refused = generate(other, model, out)
    assert refused.exit_code == 2
    assert str(other) in refused.output
    assert rows(out).equals(before)
    assert generate(data, model, out).exit_code == 0
    assert rows(out).equals(undisturbed)


def as_bitmaps(images: Path, out: Path) -> Path:
    """The phantoms as BMP files of equal size in bytes."""
    for file in images.glob("*/images/*.png"):
        target = out / file.parts[-3] / "images" / f"{file.stem}.bmp"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).save(target)
    return out


@pytest.mark.parametrize("moved", [True, False])
def test_files_of_equal_size_are_distinguished_by_content(
    images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: bool
) -> None:
    data, out = as_bitmaps(images, tmp_path / "data"), tmp_path / "run"

    def stop(bench: shard.WorkerContext, number: int) -> dict:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shard, "run_shard", stop)
        assert generate(data, model, out).exit_code == 130
    assert len({file.stat().st_size for file in data.rglob("*.bmp")}) == 1
    other = shutil.copytree(data, tmp_path / "other") if moved else data
    for number, file in enumerate(sorted(other.rglob("*.bmp"))):
        noise = np.random.default_rng(number).integers(0, 256, (32, 32), np.uint8)
        Image.fromarray(noise).save(file)
    refused = generate(other, model, out)
    assert refused.exit_code == 2
    assert "other content" in refused.output
    assert not list(out.glob("records/*"))


def test_a_moved_data_set_is_followed_and_remembered(
    interrupted: tuple[Path, Path], model: Path, tmp_path: Path, undisturbed: pd.DataFrame
) -> None:
    data, out = interrupted
    assert generate(data.rename(tmp_path / "elsewhere"), model, out).exit_code == 0
    assert rows(out).equals(undisturbed)
    assert open_run(str(out)).about["data_root"] == str(tmp_path / "elsewhere")
    reduced = diffva("reduce", out, "--executor", "inline")
    assert reduced.exit_code == 0
    assert (out / "tables" / "localization.json").exists()


def test_pages_of_moved_images(images: Path, model: Path, tmp_path: Path) -> None:
    data, out, elsewhere = shutil.copytree(images, tmp_path / "data"), tmp_path / "run", tmp_path / "elsewhere"
    assert generate(data, model, out, "--limit", 3).exit_code == 0
    data.rename(elsewhere)
    before = (out / "run.json").read_bytes()
    for verb in (("report", out), ("compare", out, out, "--out", tmp_path / "comparison")):
        made = diffva(*verb, "--data", elsewhere)
        assert made.exit_code == 0, made.output
    assert len(list((out / "report/images").glob("*"))) == 6, "a strip and a map of each record"
    assert (out / "run.json").read_bytes() == before
    assert diffva("compare", out, out, "--out", tmp_path / "comparison", "--data", model).exit_code == 2


def test_a_lost_mount_writes_no_row_and_the_same_command_continues(
    interrupted: tuple[Path, Path], model: Path, tmp_path: Path, undisturbed: pd.DataFrame,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The folder exists, like a mount point, and is empty."""
    data, out = interrupted
    monkeypatch.setattr(storage, "PAUSES", (0.0, 0.0))
    whole, gone = shard.run_shard, tmp_path / "gone"

    def unmounted(bench: shard.WorkerContext, number: int) -> dict:
        if number == 2:
            data.rename(gone)
            data.mkdir()
        return whole(bench, number)

    with monkeypatch.context() as patch:
        patch.setattr(shard, "run_shard", unmounted)
        lost = generate(data, model, out)
    assert lost.exit_code == 5
    assert str(data) in lost.output
    assert "mount" in lost.output
    assert set(rows(out)["status"]) == {"ok"}
    assert generate(data, model, out).exit_code == 5, "still gone"
    data.rmdir()
    gone.rename(data)
    assert generate(data, model, out).exit_code == 0
    assert rows(out).equals(undisturbed)
    assert verify(open_run(str(out))) == []


def test_a_mount_that_returns_in_the_middle_of_a_shard(
    interrupted: tuple[Path, Path], model: Path, undisturbed: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = interrupted
    monkeypatch.setattr(storage, "PAUSES", (0.0, 0.0))
    read, away = LocalStore.read, [2]

    def flickering(store: LocalStore, path: str, *since: float) -> bytes:
        if store.uri == str(data) and path.endswith(".png") and "/images/" in path and away[0]:
            away[0] -= 1
            raise FileNotFoundError(path)
        return read(store, path, *since)

    def later(bench: shard.WorkerContext, number: int) -> dict:
        monkeypatch.setattr(LocalStore, "read", flickering)
        return whole(bench, number)

    whole = shard.run_shard
    monkeypatch.setattr(shard, "run_shard", later)
    assert generate(data, model, out).exit_code == 0
    assert away == [0]
    assert rows(out).equals(undisturbed)


@pytest.mark.parametrize("kind", ["image", "lung mask"])
def test_a_file_that_was_replaced_since_planning_is_noticed(
    interrupted: tuple[Path, Path], model: Path, undisturbed: pd.DataFrame, kind: str
) -> None:
    """The new file has the size of the old one."""
    data, out = interrupted
    earlier(out, 100)
    pending = undisturbed[~undisturbed["record_id"].isin(rows(out)["record_id"])]
    path = pending["image_path" if kind == "image" else "lung_mask_path"].iloc[0]
    for file in data.rglob("*.png"):
        os.utime(file, (time.time() - 1000,) * 2)
    (data / path).write_bytes(bytes(reversed((data / path).read_bytes())))
    assert generate(data, model, out).exit_code == 4
    changed = rows(out).set_index("record_id").loc[pending["record_id"].iloc[0]]
    assert changed["status"] == "error"
    assert changed["error"] == f"{kind.split()[-1]} changed since planning ({path} was written since)"
    assert (rows(out)["status"] == "ok").sum() == len(undisturbed) - 1
    shutil.copy2(data / pending["image_path"].iloc[1], data / pending["image_path"].iloc[0])
    assert diffva("retry", out, "--executor", "inline").exit_code == 0, "a retry plans anew"


def test_a_lung_mask_that_is_gone_is_noticed_and_a_retry_takes_its_successor(
    interrupted: tuple[Path, Path], model: Path, undisturbed: pd.DataFrame
) -> None:
    data, out = interrupted
    earlier(out, 100)
    for file in data.rglob("*.png"):
        os.utime(file, (time.time() - 1000,) * 2)
    pending = undisturbed[~undisturbed["record_id"].isin(rows(out)["record_id"])]
    record, path = pending[["record_id", "lung_mask_path"]].iloc[0]
    content = (data / path).read_bytes()
    (data / path).unlink()
    assert generate(data, model, out).exit_code == 4
    assert rows(out).set_index("record_id").loc[record, "error"] == (
        f"its lung mask {path} cannot be read any more (FileNotFoundError)"
    )
    assert (rows(out)["status"] == "ok").sum() == len(undisturbed) - 1
    (data / path).write_bytes(content)
    assert diffva("retry", out, "--executor", "inline").exit_code == 0
    row = next(row for row in as_records(read_records(open_run(str(out)))) if row["record_id"] == record)
    assert row["counterfactual_path"].startswith("overlays/r1/")
    about = out / "overlays/r1/run.json"  # the mask is newer than the run, and older than its retry
    os.utime(data / path, (datetime.fromisoformat(json.loads(about.read_text())["started"]).timestamp() - 5,) * 2)
    assert read_truth(open_run(str(out)), row, {}).lungs is not None


def test_a_data_set_that_was_restored_from_a_copy_is_taken(
    interrupted: tuple[Path, Path], model: Path, undisturbed: pd.DataFrame
) -> None:
    """All its files are newer than the plan, and have the planned content."""
    data, out = interrupted
    earlier(out, 100)
    assert generate(data, model, out).exit_code == 0
    assert rows(out).equals(undisturbed)


def earlier(out: Path, seconds: float) -> None:
    """Make the run look as if it had been planned that long ago."""
    about = json.loads((out / "run.json").read_text())
    started = datetime.now(timezone.utc) - timedelta(seconds=seconds)
    (out / "run.json").write_text(json.dumps({**about, "started": started.isoformat(timespec="seconds")}))


def test_single_missing_images_are_rows(interrupted: tuple[Path, Path], model: Path, undisturbed: pd.DataFrame) -> None:
    data, out = interrupted
    pending = undisturbed[~undisturbed["record_id"].isin(rows(out)["record_id"])]
    lost = pending["image_path"].iloc[0]
    (data / lost).unlink()
    ended = generate(data, model, out)
    assert ended.exit_code == 4, ended.output
    statuses = rows(out).set_index("image_path")["status"]
    assert statuses[lost] == "missing"
    assert (statuses.drop(lost) == "ok").all()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
@pytest.mark.parametrize("mode", [0o000, 0o444], ids=["unlisted", "listed and not entered"])
def test_a_class_without_read_permission_is_an_error(images: Path, tmp_path: Path, mode: int) -> None:
    data = shutil.copytree(images, tmp_path / "data")
    assert diffva("inspect", data).exit_code == 0  # everything is imported
    for folder in [*tmp_path.parents][:-2]:
        folder.chmod(folder.stat().st_mode | 0o055)
    tmp_path.chmod(0o755)
    data.chmod(0o755)
    (data / "COVID").chmod(mode)
    os.seteuid(65534)
    try:
        ended = diffva("inspect", data)
    finally:
        os.seteuid(0)
    assert ended.exit_code == 5, ended.output
    assert f"{data}/COVID" in ended.output
    assert "Permission denied" in ended.output


def test_a_data_set_that_is_lost_while_it_is_sampled_is_not_planned(
    images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample of the one image that was read before would tell no other data set from this one."""
    copy, gone = tmp_path / "images", tmp_path / "gone"
    shutil.copytree(images, copy)
    whole = data_identity._sha256

    def lost_after_one(store: LocalStore, path: str) -> str | None:
        found = whole(store, path)
        if copy.exists():
            copy.rename(gone)
        return found

    monkeypatch.setattr(data_identity, "_sha256", lost_after_one)
    result = generate(copy, model, tmp_path / "run")
    assert result.exit_code == 5, result.output
    assert "listed images can be read; mount the data set again" in result.stderr
    monkeypatch.undo()
    gone.rename(copy)
    assert generate(copy, model, tmp_path / "run").exit_code == 0
    assert len(open_run(str(tmp_path / "run")).about["data_sample"]) == data_identity.SAMPLE_SIZE
