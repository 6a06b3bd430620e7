"""Exports of a real run, read as others read them: with pyarrow, tarfile, json and Pillow."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from click.testing import Result
from export_files import diffva, expected, header, pixels, tree
from PIL import Image

from diffva_ray.data.shapes import Runs, coco_counts
from diffva_ray.export import exporting, writing
from diffva_ray.export.formats import FORMATS
from diffva_ray.export.selection import NOT_BEST
from diffva_ray.generate.committed import parts
from diffva_ray.generate.run import open_run
from diffva_ray.storage.local import LocalStore
from diffva_ray.storage.store import StoreError

Export = Callable[..., Result]
PIXELS = ("image", "counterfactual", "reconstruction", "ground_truth", "lesion_mask", "lung_mask")


def parquet_rows(out: Path) -> Iterator[dict[str, Any]]:
    for path in sorted((out / "data").glob("*.parquet")):
        yield from pq.read_table(path).to_pylist()


def test_parquet_holds_every_record_with_its_pixels(finished: Path, export: Export, tmp_path: Path) -> None:
    result, out = export(finished, "huggingface"), tmp_path / "out"
    assert result.exit_code == 0, result.output
    wanted, seen = expected(finished), set()
    assert len(wanted) == 17
    for row in parquet_rows(out):
        record = wanted[row["record_id"]]
        seen.add(row["record_id"])
        for name in PIXELS:
            np.testing.assert_array_equal(pixels(row[name]["bytes"]), record[name], name)
        np.testing.assert_allclose(np.array(row["attribution"]), record["attribution"], atol=1e-4)
        assert row["label"] == record["label"]
        assert row["ssim"] == record["ssim"]
    assert seen == set(wanted)
    schema = pq.read_schema(next((out / "data").glob("*.parquet")))
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == schema.names
    assert features["attribution"] == {"shape": [32, 32], "dtype": "float32", "_type": "Array2D"}
    assert features["image"] == {"_type": "Image"}


def test_the_card_names_every_file_and_no_path_of_this_machine(finished: Path, export: Export, tmp_path: Path) -> None:
    export(finished, "huggingface", "--splits", "train=0.5,test=0.5", "--license", "cc-by-4.0")
    out = tmp_path / "out"
    (config,) = header(out)["configs"]
    named = {path.name for entry in config["data_files"] for path in out.glob(entry["path"])}
    assert named == {path.name for path in (out / "data").iterdir()}
    assert header(out)["license"] == "cc-by-4.0"
    card = (out / "README.md").read_text()
    for text in ("Not for clinical use", "synthetic", "10.1038/s41598-024-81646-x", "ddim-inversion", "Limits"):
        assert text in card
    for path in out.rglob("*"):
        if path.is_file():
            assert str(finished.parent).encode() not in path.read_bytes(), path


def test_tar_shards_hold_every_record(finished: Path, export: Export, tmp_path: Path) -> None:
    assert export(finished, "webdataset").exit_code == 0
    wanted, found = expected(finished), dict[str, dict[str, bytes]]()
    for path in sorted((tmp_path / "out" / "shards").glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (0, 0, 0, "", 0o644)
                key, _, name = member.name.partition(".")
                file = archive.extractfile(member)
                assert file is not None
                found.setdefault(key, {})[name] = file.read()
    assert found.keys() == wanted.keys()
    for key, files in found.items():
        for name in PIXELS:
            np.testing.assert_array_equal(pixels(files[f"{name}.png"]), wanted[key][name], name)
        signed = np.load(io.BytesIO(files["attribution.npy"]))
        np.testing.assert_allclose(signed, wanted[key]["attribution"], atol=1e-4)
        row = json.loads(files["json"], parse_constant=pytest.fail)  # no NaN, no Infinity
        assert row["seed"] == wanted[key]["seed"]


def test_coco_regions_are_the_map_above_the_threshold(finished: Path, export: Export, tmp_path: Path) -> None:
    assert export(finished, "coco", "--threshold", 0.02).exit_code == 0
    wanted, count = expected(finished), 0
    for path in (tmp_path / "out" / "annotations").glob("*.json"):
        coco = json.loads(path.read_text())
        for image in coco["images"]:
            record = wanted[image["record"]["record_id"]]
            folder = tmp_path / "out" / "images" / path.stem
            np.testing.assert_array_equal(pixels((folder / image["file_name"]).read_bytes()), record["image"])
            masks = np.zeros((2, 32, 32), int)
            for annotation in (entry for entry in coco["annotations"] if entry["image_id"] == image["id"]):
                mask = Runs(counts=coco_counts(annotation["segmentation"]["counts"])).mask(32, 32)
                assert mask.sum() == annotation["area"] > 0
                x, y, width, height = annotation["bbox"]
                assert mask[y : y + height, x : x + width].sum() == annotation["area"]
                masks[annotation["category_id"] - 1] += mask
            lungs, lesion = record["lung_mask"] > 0, record["lesion_mask"] > 0
            np.testing.assert_array_equal(masks[0], (record["attribution"] > 0.02) & lungs)
            np.testing.assert_array_equal(masks[1], lesion)
            count += 1
    assert count == len(wanted)


def test_coco_takes_the_threshold_of_the_run(run: Path, export: Export, tmp_path: Path) -> None:
    best = json.loads((run / "tables" / "thresholds.json").read_text())["positive"]
    assert export(run, "coco").exit_code == 0
    coco = json.loads((tmp_path / "out" / "annotations" / "train-00000.json").read_text())
    assert coco["info"]["threshold"] == best
    (run / "tables" / "thresholds.json").unlink()
    result = export(run, "coco", out=tmp_path / "other")
    assert result.exit_code == 2
    assert "--threshold" in result.stderr


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_an_interrupted_export_continues_to_the_same_bytes(
    kind: str, finished: Path, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(exporting.FORMATS, kind, dataclasses.replace(FORMATS[kind], records=6))
    assert export(finished, kind, out=tmp_path / "whole").exit_code == 0
    whole = tree(tmp_path / "whole")
    assert len([name for name in whole if name.startswith(FORMATS[kind].folder)]) > 3
    put, written = LocalStore.put, list[str]()

    def failing(self: LocalStore, path: str, data: bytes) -> None:
        if path.startswith(FORMATS[kind].folder):
            if len(written) == 2:
                raise StoreError("the disk is full", lasting=True)
            written.append(path)
        put(self, path, data)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "put", failing)
        result = export(finished, kind)
    assert result.exit_code == 5, result.output
    assert "_SUCCESS" not in tree(tmp_path / "out")
    first = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in written}
    read = set[int]()

    def recorded(*arguments: Any, **more: Any) -> Iterator[Any]:
        for shard, table in parts(*arguments, **more):
            read.add(shard)
            yield shard, table

    monkeypatch.setattr(writing, "parts", recorded)
    assert export(finished, kind).exit_code == 0
    pending = {name for name in whole if name.startswith(FORMATS[kind].folder)} - set(written)
    assert read == {int(Path(name).stem.rpartition("-")[2]) for name in pending} < {0, 1, 2}  # and no shard before
    assert tree(tmp_path / "out") == whole
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in written} == first  # kept, not written again
    result = export(finished, kind)
    assert "nothing written" in result.output


def test_without_images_no_pixel_of_the_source_is_exported(finished: Path, export: Export, tmp_path: Path) -> None:
    for kind in FORMATS:
        more = ("--threshold", 0.02) if kind == "coco" else ()
        assert export(finished, kind, "--without-images", *more, out=tmp_path / kind).exit_code == 0
    rows = list(parquet_rows(tmp_path / "huggingface"))
    assert not {"image", "reconstruction", "ground_truth"} & set(rows[0])
    assert all(row["image_path"] and row["image_sha256"] for row in rows)
    assert "left out" in (tmp_path / "huggingface" / "README.md").read_text()
    with tarfile.open(tmp_path / "webdataset" / "shards" / "train-00000.tar") as archive:
        names = {name.partition(".")[2] for name in archive.getnames()}
    assert names == {"counterfactual.png", "lesion_mask.png", "lung_mask.png", "attribution.npy", "json"}
    coco = json.loads((tmp_path / "coco" / "annotations" / "train-00000.json").read_text())
    assert all(image["file_name"] == image["record"]["image_path"] for image in coco["images"])


def test_the_gate_exports_accepted_records_and_says_the_rate(finished: Path, export: Export, tmp_path: Path) -> None:
    wanted = expected(finished)
    middle = float(np.median([record["ssim"] for record in wanted.values()]))
    rule = f"ssim > {middle} and judge_counterfactual >= 0"
    result = export(finished, "huggingface", "--accept", rule)
    assert result.exit_code == 0, result.output
    exported = {row["record_id"] for row in parquet_rows(tmp_path / "out")}
    assert exported == {key for key, record in wanted.items() if record["ssim"] > middle}
    rejected = pd.read_parquet(tmp_path / "out" / "rejected.parquet").set_index("record_id")["reason"]
    assert set(rejected.index) == set(pd.read_parquet(finished / "records")["record_id"]) - exported
    assert (rejected.loc[list(wanted.keys() - exported)] == f"not ssim > {middle}").all()
    assert rejected.drop(list(wanted.keys() - exported)).str.startswith("bad_image: ").all()  # the quarantined one
    card = (tmp_path / "out" / "README.md").read_text()
    by_class = pd.Series([record["label"] for record in wanted.values()]).value_counts()
    for label, count in by_class.items():
        accepted = sum(wanted[key]["label"] == label for key in exported)
        assert f"{label}: {accepted} of {count} records accepted" in result.output
        assert f"| {label} | {count} | {accepted} |" in card
    assert "judge" in result.stderr
    assert "is no evidence" in card
    nothing = export(finished, "huggingface", "--accept", "ssim > 2", out=tmp_path / "none")
    assert nothing.exit_code == 2
    assert not (tmp_path / "none").exists()


def test_another_export_or_other_files_are_never_overwritten(finished: Path, export: Export, tmp_path: Path) -> None:
    assert export(finished, "huggingface").exit_code == 0
    before = tree(tmp_path / "out")
    for more in (("--accept", "ssim > 0"), ("--best-of", "ssim"), ("--without-images",), ("--license", "mit")):
        result = export(finished, "huggingface", *more)
        assert result.exit_code == 3
        assert more[0].removeprefix("--without-").removeprefix("--").replace("-", "_") in result.stderr
    assert export(finished, "webdataset").exit_code == 3
    assert export(finished, "huggingface", out=finished).exit_code == 2
    assert tree(tmp_path / "out") == before


def test_only_a_reduced_run_is_exported(run: Path, export: Export) -> None:
    (run / "_SUCCESS").unlink()
    result = export(run, "huggingface")
    assert (result.exit_code, "diffva reduce" in result.stderr) == (2, True)
    next((run / "records").iterdir()).unlink()
    assert export(run, "huggingface").exit_code == 5


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_changed_and_damaged_images_are_named_and_not_exported(
    kind: str, run: Path, export: Export, tmp_path: Path
) -> None:
    record = next(iter(expected(run).values()))
    for folder, column, code in ((run, "counterfactual_path", 5), (run.parent / "data", "image_path", 2)):
        path = folder / record[column]
        original = path.read_bytes()
        other = 255 - pixels(original)
        Image.fromarray(other).save(path)
        result = export(run, kind, "--data", run.parent / "data", out=tmp_path / column)
        assert result.exit_code == code, result.output
        assert record[column] in result.stderr
        assert len(result.stderr.strip().splitlines()[-1:]) == 1
        assert not (tmp_path / column / "_SUCCESS").exists()
        path.write_bytes(original)
        assert export(run, kind, "--data", run.parent / "data", out=tmp_path / column).exit_code == 0


def test_datasets_loads_the_export_with_its_types(finished: Path, export: Export, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    assert export(finished, "huggingface", "--splits", "test=1").exit_code == 0
    wanted = expected(finished)
    for streaming in (False, True):
        loaded = datasets.load_dataset(
            str(tmp_path / "out"), split="test", streaming=streaming, cache_dir=str(tmp_path / "cache")
        )
        rows = list(loaded)
        assert {row["record_id"] for row in rows} == set(wanted)
        for row in rows:
            record = wanted[row["record_id"]]
            np.testing.assert_array_equal(np.asarray(row["counterfactual"]), record["counterfactual"])
            np.testing.assert_allclose(np.array(row["attribution"]), record["attribution"], atol=1e-4)


def test_the_best_sample_of_each_image_is_exported(images: Path, model: Path, export: Export, tmp_path: Path) -> None:
    more = (
        "--method",
        "sdedit",
        "--samples",
        3,
        "--limit",
        12,
        "--seed",
        1,
        "--set",
        "generate.shard_size=4",
        "--executor",
        "inline",
    )
    made = diffva("generate", "--data", images, "--model", model, "--out", tmp_path / "run", *more)
    assert made.exit_code == 0, made.output
    assert diffva("reduce", tmp_path / "run", "--executor", "inline").exit_code == 0
    records = pd.read_parquet(tmp_path / "run" / "records")
    for score, ascending in (("ssim", False), ("l1", True)):
        best = records.sort_values(score, ascending=ascending).groupby("image_path")["record_id"].first()
        assert len(best) < len(records)
        result = export(tmp_path / "run", "huggingface", "--best-of", score, out=tmp_path / score)
        assert result.exit_code == 0, result.output
        assert {row["record_id"] for row in parquet_rows(tmp_path / score)} == set(best)
        rejected = pd.read_parquet(tmp_path / score / "rejected.parquet")
        assert (rejected["reason"] == NOT_BEST).all()
        assert len(rejected) == len(records) - len(best)
    # the best of those that the rule accepts
    bar = records["ssim"].median()
    best = (
        records[records["ssim"] < bar].sort_values("ssim", ascending=False).groupby("image_path")["record_id"].first()
    )
    assert export(tmp_path / "run", "huggingface", "--best-of", "ssim", "--accept", f"ssim < {bar}").exit_code == 0
    assert {row["record_id"] for row in parquet_rows(tmp_path / "out")} == set(best)
    assert "judge" in export(tmp_path / "run", "coco", "--best-of", "judge_counterfactual").stderr


def test_lineage_leads_from_the_images_to_the_export(finished: Path, export: Export, tmp_path: Path) -> None:
    found = []
    for name, more in (("first", ()), ("second", ("--accept", "ssim > 0")), ("third", ("--license", "mit"))):
        assert export(finished, "huggingface", *more, out=tmp_path / name).exit_code == 0
        found.append(json.loads((tmp_path / name / "lineage.json").read_text()))
    run = open_run(str(finished))
    for content in found:
        assert content["run"]["fingerprint"] == run.fingerprint
        assert content["model"]["digest"] == run.keys["model_digest"]
        assert content["data"] == found[0]["data"]
        assert content["data"]["images"] == 17
    assert len({content["export"]["digest"] for content in found}) == 3  # the rule and the licence are part of it
    assert found[1]["export"]["accept"] == "ssim > 0"


def test_the_data_digest_does_not_depend_on_the_run(
    finished: Path, model: Path, export: Export, tmp_path: Path
) -> None:
    more = ("--samples", 2, "--seed", 5, "--executor", "inline", "--set", "evaluate.max_quarantined_fraction=0.5")
    data = finished.parent / "data"
    assert diffva("generate", "--data", data, "--model", model, "--out", tmp_path / "other", *more).exit_code == 0
    assert diffva("reduce", tmp_path / "other", "--executor", "inline").exit_code == 0
    digests = []
    for run, name in ((finished, "first"), (tmp_path / "other", "second")):
        assert export(run, "huggingface", out=tmp_path / name).exit_code == 0
        digests.append(json.loads((tmp_path / name / "lineage.json").read_text())["data"]["digest"])
    assert digests[0] == digests[1]


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_croissant_names_the_files_and_the_columns(kind: str, finished: Path, export: Export, tmp_path: Path) -> None:
    assert export(finished, kind, "--license", "mit").exit_code == 0
    described = json.loads((tmp_path / "out" / "croissant.json").read_text())
    (files,) = described["distribution"]
    named = sorted((tmp_path / "out").glob(files["includes"]))
    assert named == sorted((tmp_path / "out" / FORMATS[kind].folder).iterdir())
    assert described["license"] == "mit"
    if kind in ("huggingface", "dicom"):
        columns = [field["source"]["extract"]["column"] for field in described["recordSet"][0]["field"]]
        assert columns == pq.read_schema(named[0]).names


def test_anonymised_names_are_not_among_the_rejected(finished: Path, export: Export, tmp_path: Path) -> None:
    for name, more in (("named", ()), ("nameless", ("--anonymise-names",))):
        assert export(finished, "huggingface", "--accept", "ssim > 0", *more, out=tmp_path / name).exit_code == 0
    named, nameless = (pd.read_parquet(tmp_path / name / "rejected.parquet") for name in ("named", "nameless"))
    assert list(named["record_id"]) == list(nameless["record_id"])
    assert nameless["image_path"].str.startswith("image-").all()
    assert "bad_image" in set(nameless["reason"])  # without the error, which may quote the file


def members(path: Path) -> list[str]:
    """The ids of the records of a tar file, in their order."""
    with tarfile.open(path) as archive:
        return [name.partition(".")[0] for name in archive.getnames() if name.endswith(".json")]


def test_records_are_shuffled_by_a_seed(
    finished: Path, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, "webdataset", dataclasses.replace(FORMATS["webdataset"], records=6))
    orders = []
    for name, seed in {"plan": None, "first": 1, "again": 1, "third": 2}.items():
        more = () if seed is None else ("--shuffle", seed)
        result = export(finished, "webdataset", "--splits", "train=1", *more, out=tmp_path / name)
        assert result.exit_code == 0, result.output
        orders.append([members(path) for path in sorted((tmp_path / name / "shards").iterdir())])
    flat = [[record for file in files for record in file] for files in orders]
    assert len(orders[0]) > 1
    assert flat[1] == flat[2]
    assert tree(tmp_path / "first") == tree(tmp_path / "again")
    assert len({tuple(records) for records in flat}) == 3
    assert len({tuple(sorted(records)) for records in flat}) == 1
    assert export(finished, "webdataset", "--splits", "train=1", out=tmp_path / "first").exit_code == 3  # another order


def test_the_index_counts_the_samples_of_each_tar(finished: Path, export: Export, tmp_path: Path) -> None:
    assert export(finished, "webdataset").exit_code == 0
    counted = 0
    for path in (tmp_path / "out").glob("*.wids.json"):
        index = json.loads(path.read_text())
        assert path.name == f"{index['name']}.wids.json"
        for shard in index["shardlist"]:
            assert len(members(tmp_path / "out" / shard["url"])) == shard["nsamples"]
            counted += shard["nsamples"]
    assert counted == 17
