"""A shard: every planned record becomes one row that agrees with its files, and the part is written last."""

from __future__ import annotations

import io
import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from diffva_ray.cli import main
from diffva_ray.config.recipe import Recipe
from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.data.encoding import map_levels, pixel_digest
from diffva_ray.data.images import decode_map, read_map
from diffva_ray.evaluate.records import read_images, read_records
from diffva_ray.generate.attempts import GpuFailed, OutOfMemory
from diffva_ray.generate.plan import Request
from diffva_ray.generate.run import PlanError, find_run
from diffva_ray.generate.shard import run_shard
from diffva_ray.generate.verification import requeue, verify
from diffva_ray.generate.worker import WorkerContext
from diffva_ray.metrics.ssim import ssim
from diffva_ray.storage.local import LocalStore
from diffva_ray.storage.store import StoreError
from diffva_ray.workflows.execution import Execution
from diffva_ray.workflows.generate import generate_run

INLINE = Execution(executor="inline")


def run_inline(recipe: Recipe, data: Path, model: Path, out: Path, request: Request = Request()):
    counts = generate_run(recipe, str(data), str(model), str(out), request, INLINE)
    run = find_run(LocalStore(str(out)))
    assert run is not None
    return run, counts


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def finished(tiny: Recipe, images: Path, model: Path, tmp_path_factory: pytest.TempPathFactory):
    return run_inline(tiny, images, model, tmp_path_factory.mktemp("run"))[0]


def test_records_agree_with_their_files(finished, images: Path) -> None:
    frame = read_records(finished)
    assert len(frame) == 18
    assert set(frame["status"]) == {"ok"}
    for row in frame.to_dict("records"):
        counterfactual = np.asarray(Image.open(io.BytesIO(finished.store.read(row["counterfactual_path"]))))
        assert counterfactual.dtype == np.uint8
        assert counterfactual.shape == (32, 32)
        assert pixel_digest(counterfactual) == row["counterfactual_sha256"]
        made = read_images(finished, row)
        assert ssim(made.image, made.counterfactual) == pytest.approx(row["ssim"], abs=1e-6)
        assert np.abs(made.signed_map).mean() == pytest.approx(row["attribution_energy"], abs=1e-4)
        stored = finished.store.read(row["attribution_path"])
        assert pixel_digest(map_levels(decode_map(stored))) == row["attribution_sha256"]
        assert read_map(str(finished.store.root / row["attribution_path"])).shape == (32, 32)
        assert 0 <= row["judge_counterfactual"] <= 1
        assert (row["width"], row["height"]) == (32, 32)
        assert row["attribution_kind"] == "compensated-gauss0.016w"


def test_parts_are_plain_parquet_with_the_fingerprint(finished) -> None:
    file = finished.store.root / "records" / "part-00000.parquet"
    assert pq.read_schema(file).metadata[b"fingerprint"].decode() == finished.fingerprint
    assert len(pd.read_parquet(file)) == 6
    features = np.load(finished.store.root / "features" / "part-00000.npz")
    assert list(features["ids"]) == pd.read_parquet(file)["record_id"].tolist()
    assert features["stand-in-random-conv-64/counterfactual"].dtype == np.float32


def test_images_are_stored_during_generation_and_before_the_commit(
    tiny: Recipe, images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first image is stored only after the second micro-batch is generated, and the part after all images."""
    generated, order = threading.Event(), []
    call, put_if_absent = CounterfactualEngine.__call__, LocalStore.put_if_absent

    def counted(self, *arguments):
        made = call(self, *arguments)
        order.append("generated")
        if order.count("generated") == 2:
            generated.set()
        return made

    def waiting(self, path: str, data: bytes) -> bool:
        if path.endswith(".png"):
            assert generated.wait(120), "the work waits for its images"
            order.append("image")
        if path.startswith("records/"):
            order.append("part")
        return put_if_absent(self, path, data)

    monkeypatch.setattr(CounterfactualEngine, "__call__", counted)
    monkeypatch.setattr(LocalStore, "put_if_absent", waiting)
    run_inline(tiny, images, model, tmp_path, Request(limit=6))  # micro-batches of 4 and 2
    assert order[:2] == ["generated", "generated"]
    assert order[2:] == ["image"] * 18 + ["part"]


def test_the_same_command_again_writes_nothing(finished, tiny: Recipe, images: Path, model: Path) -> None:
    before = tree(finished.store.root)
    _, counts = run_inline(tiny, images, model, finished.store.root)
    assert counts["shards"] == 0
    assert tree(finished.store.root) == before


def test_lost_parts_come_back_bit_by_bit(finished, tiny: Recipe, images: Path, model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished.store.root, copy)
    (copy / "records" / "part-00001.parquet").unlink()
    shutil.rmtree(copy / "attributions" / "part-00001")
    run, counts = run_inline(tiny, images, model, copy)
    assert counts["shards"] == 1
    assert read_records(run).equals(read_records(finished))
    pictures = {path: content for path, (_, content) in tree(copy).items() if path.endswith(".png")}
    assert pictures == {p: content for p, (_, content) in tree(finished.store.root).items() if p.endswith(".png")}


def test_a_crash_before_the_part_commits_nothing(tiny: Recipe, images: Path, model: Path, tmp_path: Path) -> None:
    run, _ = run_inline(tiny, images, model, tmp_path / "run")
    run.store.delete("records/part-00002.parquet")
    context = WorkerContext.open(run.store.uri, str(images), str(model))

    class Dying(LocalStore):
        def put_if_absent(self, path: str, data: bytes) -> bool:
            raise RuntimeError("power cut")

    context.run = type(run)(Dying(run.store.uri), run.about)
    with pytest.raises(RuntimeError, match="power cut"):
        run_shard(context, 2)
    assert run.pending() == [2]
    context.run = run
    assert run_shard(context, 2)["records"] == 6
    assert verify(run) == []


def damaged_copy(images: Path, folder: Path) -> dict[str, str]:
    """A data set in which some COVID images are bad, and the expected status of each."""
    shutil.copytree(images, folder)
    good = sorted((folder / "COVID" / "images").iterdir())
    good[0].write_bytes(b"")
    good[1].write_bytes(good[1].read_bytes()[:200])
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(good[2])
    good[3].write_bytes(b"<html>not found</html>")
    expected = ["bad_image", "bad_image", "too_small", "bad_image"]
    return {f"COVID/images/{path.name}": status for path, status in zip(good, expected, strict=False)}


def test_bad_input_is_a_row_and_other_images_keep_their_pixels(
    finished, tiny: Recipe, images: Path, model: Path, tmp_path: Path
) -> None:
    expected = damaged_copy(images, tmp_path / "images")
    run, counts = run_inline(tiny, tmp_path / "images", model, tmp_path / "run")
    assert counts == {"shards": 3, "records": 18, "ok": 14}
    frame = read_records(run).set_index("image_path")
    assert {path: frame.loc[path, "status"] for path in expected} == expected
    assert frame.loc[list(expected), "error"].str.len().min() > 5
    assert frame.loc[list(expected), "counterfactual_path"].isna().all()
    intact = read_records(finished).set_index("image_path")
    ok = frame[frame["status"] == "ok"].index
    assert frame.loc[ok, "counterfactual_sha256"].equals(intact.loc[ok, "counterfactual_sha256"])
    assert verify(run) == []


def test_images_that_vanish_change_or_arrive_after_planning(
    tiny: Recipe, images: Path, model: Path, tmp_path: Path
) -> None:
    data = tmp_path / "images"
    shutil.copytree(images, data)
    run, _ = run_inline(tiny, data, model, tmp_path / "run")
    for shard in range(run.shards):
        run.store.delete(f"records/part-{shard:05d}.parquet")
    covid = sorted((data / "COVID" / "images").iterdir())
    covid[0].unlink()
    covid[1].write_bytes((data / "Normal" / "images" / "Normal-1.png").read_bytes() + b"\0" * 7)
    shutil.copy(covid[2], covid[2].with_name("new.png"))
    run, _ = run_inline(tiny, data, model, tmp_path / "run")
    frame = read_records(run).set_index("image_path")
    assert len(frame) == 18
    assert frame.loc[f"COVID/images/{covid[0].name}", "status"] == "missing"
    changed = frame.loc[f"COVID/images/{covid[1].name}"]
    assert changed["status"] == "error"
    assert "changed since planning" in changed["error"]


def test_a_prompt_longer_than_the_model_reads(
    tiny: Recipe, images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused before planning, or quarantines its record if only the workers can read the tokenizer."""
    request = Request(prompt="a very long prompt about absolutely everything", limit=3)
    with pytest.raises(PlanError, match="more than the 16 tokens"):
        run_inline(tiny, images, model, tmp_path / "run", request)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("diffva_ray.model.card.ModelFolder.too_long", lambda folder, prompts: (0, []))
    run, counts = run_inline(tiny, images, model, tmp_path / "run", request)
    assert counts["ok"] == 0
    assert Counter(read_records(run)["status"]) == {"prompt_too_long": 3}


def test_verify_names_every_kind_of_damage_and_repair_requeues(finished, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished.store.root, copy)
    run = find_run(LocalStore(str(copy)))
    assert run is not None
    assert verify(run) == []
    rows = read_records(run).to_dict("records")
    (copy / rows[0]["counterfactual_path"]).unlink()
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(copy / rows[6]["reconstruction_path"])
    (copy / rows[7]["attribution_path"]).write_bytes(b"torn")
    (copy / "records" / "part-00002.parquet").write_bytes(b"PAR1 torn")
    (copy / "records" / "part-00009.parquet").write_bytes(b"stranger")
    found = [problem.what for problem in verify(run)]
    assert len(found) == 5
    for name, what in (
        (rows[0]["counterfactual_path"], "missing"),
        (rows[6]["reconstruction_path"], "other pixels"),
        (rows[7]["attribution_path"], "cannot be read"),
        ("part-00002", "cannot be read"),
        ("part-00009", "not planned"),
    ):
        assert any(name in line and what in line for line in found), (name, found)
    assert requeue(run, verify(run)) == 4
    assert run.pending() == [0, 1, 2]


@pytest.mark.parametrize("size", [1, 4])
def test_shard_size_and_actor_order_do_not_change_pixels(
    size: int, finished, tiny: Recipe, images: Path, model: Path, tmp_path: Path
) -> None:
    recipe = tiny.model_copy(update={"generate": tiny.generate.model_copy(update={"shard_size": size})})
    run, _ = run_inline(recipe, images, model, tmp_path / "run")
    ours, theirs = (
        read_records(r).set_index("record_id")["counterfactual_sha256"].sort_index() for r in (run, finished)
    )
    assert ours.equals(theirs)


def test_moved_images_are_found_with_data(finished, tiny: Recipe, images: Path, model: Path, tmp_path: Path) -> None:
    """A run whose images were moved continues with --data and ends like an undisturbed one."""
    before, after = tmp_path / "before", tmp_path / "after"
    shutil.copytree(images, before)
    run, _ = run_inline(tiny, before, model, tmp_path / "run")
    for part in ("part-00001", "part-00002"):
        (tmp_path / "run" / "records" / f"{part}.parquet").unlink()
    before.rename(after)
    _, counts = run_inline(tiny, after, model, tmp_path / "run")
    assert counts == {"shards": 2, "records": 12, "ok": 12}
    ours, theirs = (read_records(one).set_index("record_id")["counterfactual_sha256"] for one in (run, finished))
    assert ours.equals(theirs)


def test_a_dry_run_with_other_settings_reports_what_the_command_would(
    finished, images: Path, model: Path, tiny: Recipe
) -> None:
    words = [
        "generate",
        "--data",
        images,
        "--model",
        model,
        "--out",
        finished.store.root,
        "--strength",
        0.9,
        "--dry-run",
    ]
    result = CliRunner().invoke(main, list(map(str, words)))
    assert result.exit_code == 3
    assert "strength: 0." in result.output


def test_nothing_is_generated_for_a_store_that_has_failed(
    tiny: Recipe, images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    call = CounterfactualEngine.__call__
    put_if_absent = LocalStore.put_if_absent

    def full(self, path: str, data: bytes) -> bool:
        if path.endswith(".png"):
            raise StoreError("no space left", lasting=True)
        return put_if_absent(self, path, data)

    def counted(self, *arguments):
        calls.append(1)
        time.sleep(0.2)  # the images before it have failed by then
        return call(self, *arguments)

    monkeypatch.setattr(CounterfactualEngine, "__call__", counted)
    monkeypatch.setattr(LocalStore, "put_if_absent", full)
    recipe = tiny.model_copy(update={"generate": tiny.generate.model_copy(update={"micro_batch": 1})})
    with pytest.raises(StoreError, match="no space left"):
        run_inline(recipe, images, model, tmp_path)
    assert len(calls) <= 2, "of six"


@pytest.mark.parametrize("memory", [True, False])
def test_every_name_of_too_little_memory_is_known(
    memory: bool, tiny: Recipe, images: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuBLAS and cuDNN have their own. Another error of the GPU is not said to be one of memory."""
    message = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED" if memory else "CUDA error: an illegal memory access"

    def fail(*_: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(CounterfactualEngine, "__call__", fail)
    with pytest.raises(OutOfMemory if memory else GpuFailed, match="CUDA error") as error:
        run_inline(tiny, images, model, tmp_path / "run")
    assert ("--micro-batch" in str(error.value)) == memory
