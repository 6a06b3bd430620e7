"""Options of reduce: extractors by name, LPIPS, Brixia zones, sources; settings of a sweep are never pooled."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from diffva_ray.cli import main
from diffva_ray.data.dataset import UnusableData
from diffva_ray.evaluate.annotations import read_sources, read_zones
from diffva_ray.evaluate.records import as_records, read_records
from diffva_ray.evaluate.reduction import Options, reduce_run
from diffva_ray.evaluate.report.result_tables import report_tables
from diffva_ray.evaluate.scores import score_records
from diffva_ray.generate.plan import Request
from diffva_ray.generate.run import open_run
from diffva_ray.metrics.zones import ZONES
from diffva_ray.workflows.execution import Execution
from diffva_ray.workflows.generate import generate_run


@pytest.fixture(scope="module")
def swept(tiny, images: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two strengths and two samples of six COVID and six Lung_Opacity images."""
    out = tmp_path_factory.mktemp("swept") / "run"
    recipe = tiny.model_copy(update={"generate": tiny.generate.model_copy(update={"samples": 2})})
    request = Request(("COVID", "Lung_Opacity"), sweep=(("strength", (0.3, 0.9)),))
    generate_run(recipe, str(images), str(model), str(out), request, Execution(executor="inline"))
    return out


@pytest.fixture(scope="module")
def tables(swept: Path, images: Path) -> dict:
    return reduce_run(open_run(str(swept)), str(images), Options()).metrics


def test_every_table_of_a_sweep_is_by_setting(swept: Path, tables: dict) -> None:
    """Each row has one class and one setting, and the numbers of its records alone."""
    records = pd.read_parquet(swept / "records")
    expected = {f"{label} under strength {strength:g}" for strength in (0.3, 0.9) for label in ("COVID", "Lung_Opacity",
                                                                                               "all")}  # fmt: skip
    for name in ("ssim", "localization", "validity", "ground_truth", "counterfactual"):
        assert {row["label"] for row in tables[name]} == expected, name
    for row in tables["ssim"]:
        label, _, strength = row["label"].partition(" under strength ")
        chosen = records[(records["strength"] == float(strength)) & ((records["label"] == label) | (label == "all"))]
        assert row["n"] == len(chosen) == (24 if label == "all" else 12)
        assert row["ssim"] == pytest.approx(chosen["ssim"].mean())
    thresholds = json.loads((swept / "tables/thresholds.json").read_text())
    assert {"positive under strength 0.3", "positive under strength 0.9"} <= set(thresholds)


def test_distances_of_a_sweep_are_by_setting_and_of_one_sample(tables: dict) -> None:
    rows = {(row["set1"], row["set2"]): row for row in tables["fid"]}
    for strength in ("0.3", "0.9"):
        counterfactuals = f"COVID (counterfactual) under strength {strength}"
        assert rows["COVID (source)", counterfactuals]["n1"] == 6  # of 24 COVID records
        assert {"verisimilitude", "direction"} <= rows["Normal (reference)", counterfactuals].keys()
    assert rows["Normal (reference)", "COVID (source)"]["n2"] == 6
    assert len(rows) == len(tables["fid"])  # the reference against the images once, not once for each setting
    assert any("sample 0" in note for note in tables["notes"])
    within = {(row["set1"], row["set2"]): row for row in tables["fid_within"]}
    row = within["images", "counterfactuals under strength 0.3"]
    parts = [rows[f"{label} (source)", f"{label} (counterfactual) under strength 0.3"]["value"]
             for label in ("COVID", "Lung_Opacity")]  # fmt: skip
    assert row["within"] == pytest.approx(np.mean(parts))
    assert row["n2"] == 12
    assert within["images", "counterfactuals under every setting"]["n2"] == 24


def test_extractors_by_name_have_their_own_rows(swept: Path, images: Path, model: Path, tmp_path: Path) -> None:
    run = open_run(str(swept))
    options = Options(extractors=("judge", "stand-in"), cache=str(tmp_path))
    rows = reduce_run(run, str(images), options).metrics["fid"]
    by_name = {name: [row for row in rows if row["extractor"] == name] for name in ("judge", "stand-in-random-conv-64")}
    assert len(by_name["judge"]) == len(by_name["stand-in-random-conv-64"]) == len(rows) / 2
    assert {(row["resize"], row["is_stand_in"]) for row in by_name["judge"]} == {("clean-64", False)}
    assert len({row["weights_sha256"] for row in rows}) == 2


@pytest.mark.parametrize(
    ("extractor", "said"),
    [
        ("vgg", "no such extractor; there are inception, torchxrayvision, rad-dino, judge, stand-in"),
        ("rad-dino", "give its weights as rad-dino=PATH"),
        ("inception", "give its weights as inception=PATH"),
        ("rad-dino=nowhere", "nowhere: expected a snapshot of RAD-DINO"),
        ("judge=nowhere", "nowhere has no judge"),
    ],
)
def test_a_wrong_extractor_is_one_line_and_exit_2(extractor: str, said: str, swept: Path) -> None:
    result = CliRunner().invoke(main, ["reduce", str(swept), "--extractor", extractor, "--executor", "inline"])
    assert result.exit_code == 2
    assert said in result.stderr
    assert f"--extractor {extractor}: " in result.stderr
    assert result.stderr.strip().count("\n") == 0


@pytest.fixture
def movable(swept: Path, images: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the run and of its data set, whose files may be damaged."""
    run, data = shutil.copytree(swept, tmp_path / "run"), shutil.copytree(images, tmp_path / "data")
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**about, "data": str(data), "data_root": str(data)}))
    for computed in (run / "features").glob("judge*"):
        shutil.rmtree(computed)
    (run / "_SUCCESS").unlink(missing_ok=True)
    return run, data


@pytest.mark.parametrize(
    ("column", "damage"),
    [("image_path", b"no image"), ("image_path", None), ("counterfactual_path", b"no image")],
)
def test_an_image_that_features_need_is_named(movable: tuple[Path, Path], column: str, damage: bytes | None) -> None:
    run, data = movable
    path = pd.read_parquet(run / "records")[column][3]
    file = (data if column == "image_path" else run) / path
    file.unlink()
    if damage is not None:
        file.write_bytes(damage)
    result = CliRunner().invoke(main, ["reduce", str(run), "--extractor", "judge", "--executor", "inline"])
    if column == "image_path":
        assert result.exit_code == 2
        assert result.stderr.startswith(f"diffva reduce: {file}: needed for features and cannot be read any more (")
    else:  # the run is damaged, and can be mended
        assert result.exit_code == 5
        assert path in result.stderr
        assert "verify" in result.stderr
    assert result.stderr.strip().count("\n") == 0


def test_images_that_are_missing_now_are_counted(movable: tuple[Path, Path], tmp_path: Path) -> None:
    """A note tells that means are of fewer images; it disappears when the images are restored."""
    run, data = movable
    records = pd.read_parquet(run / "records")
    images = sorted(set(records["image_path"]))
    beside = records.set_index("image_path")
    gone = [
        images[0],
        beside.loc[images[1], "lesion_mask_path"].iloc[0],
        beside.loc[images[2], "ground_truth_path"].iloc[0],
    ]
    kept = [shutil.copy2(data / path, tmp_path / str(number)) for number, path in enumerate(gone)]
    (data / gone[0]).unlink()
    (data / gone[1]).write_bytes(b"no image")
    (data / gone[2]).unlink()
    note = f"3 images, or their masks or ground truth, cannot be read or have changed (first: {data / images[0]})"
    assert [text.split(";")[0] for text in _noted(run, data) if "cannot be read" in text] == [note]
    for path, copy in zip(gone, kept):
        shutil.copy2(copy, data / path)
    assert not [text for text in _noted(run, data) if "cannot be read" in text]


@pytest.mark.parametrize("column", ["image_path", "lesion_mask_path", "lung_mask_path", "ground_truth_path"])
def test_a_file_that_was_replaced_since_is_left_out(movable: tuple[Path, Path], column: str) -> None:
    """The new file is sound, and of another record."""
    run, data = movable
    rows = as_records(read_records(open_run(str(run))))
    first = next(row for row in rows if row["label"] == "COVID")
    other = next(row for row in rows if row["label"] == "COVID" and row["image_path"] != first["image_path"])
    assert all(score_records(open_run(str(run)), [first], {}))
    shutil.copy(data / other[column], data / first[column])
    localization, ground_truth = score_records(open_run(str(run)), [first], {})
    assert bool(localization) == (column == "ground_truth_path")
    assert bool(ground_truth) == column.endswith("mask_path")
    noted = [text for text in _noted(run, data) if "have changed" in text]
    assert len(noted) == 1
    assert noted[0].startswith("1 images, ")
    assert f"(first: {data / first['image_path']})" in noted[0]


def _noted(run: Path, data: Path) -> list[str]:
    reduced = reduce_run(open_run(str(run)), str(data), Options())
    assert reduced.fresh
    return reduced.metrics["notes"]


def test_files_of_the_options_are_read_again_when_they_change(movable: tuple[Path, Path], tmp_path: Path) -> None:
    run, data = movable
    images = sorted(set(pd.read_parquet(run / "records")["image_path"]))
    boxes = tmp_path / "boxes.csv"
    fresh = list[bool]()
    for seen in (images[:1], images[:1], images[:2]):
        boxes.write_text("file,x,y,w,h\n" + "".join(f"{image},10,10,20,20\n" for image in seen))
        fresh.append(reduce_run(open_run(str(run)), str(data), Options(boxes=str(boxes))).fresh)
    assert fresh == [True, False, True]


def test_lpips_is_in_the_ssim_table(swept: Path, images: Path, tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    pytest.importorskip("lpips")
    torch.manual_seed(0)
    torch.save(models.alexnet(weights=None).state_dict(), tmp_path / "alexnet.pth")
    metrics = reduce_run(open_run(str(swept)), str(images), Options(lpips=str(tmp_path / "alexnet.pth"))).metrics
    rows = {row["label"]: row for row in metrics["ssim"]}
    weak, strong = (rows[f"all under strength {strength}"] for strength in ("0.3", "0.9"))
    assert min(weak["lpips"], strong["lpips"]) > 0
    assert weak["lpips"] != strong["lpips"]
    assert weak["lpips_n"] == 24
    assert weak["lpips_interval"][0] < weak["lpips"] < weak["lpips_interval"][1]
    with pytest.raises(UnusableData, match=r"^--lpips-weights: .*nowhere\.pth: expected torchvision's AlexNet"):
        reduce_run(open_run(str(swept)), str(images), Options(lpips=str(tmp_path / "nowhere.pth")))


def zones_csv(path: Path, images: list[str], score: Callable[[int, int], object]) -> Path:
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", *(f"{reader}-{zone}" for reader in "SJ" for zone in ZONES)])
        for n, image in enumerate(images):
            table.writerow([image, *(score(n, at) for _ in "SJ" for at in range(6))])
    return path


def test_brixia_scores_are_compared_with_the_maps(swept: Path, images: Path, tmp_path: Path) -> None:
    """The scores are the lesions of the phantoms, which agree with brightness."""
    records = pd.read_parquet(swept / "records")
    paths = sorted(records["image_path"].unique())
    scores = zones_csv(tmp_path / "zones.csv", [f"elsewhere/{path}" for path in paths], lambda n, at: (n + at) % 4)
    metrics = reduce_run(open_run(str(swept)), str(images), Options(brixia=str(scores))).metrics
    rows = {row["map"]: row for row in metrics["brixia"]}
    assert set(rows) == {f"{name} under strength {strength}" for name in ("positive", "absolute", "brightness")
                         for strength in ("0.3", "0.9")}  # fmt: skip
    assert {row["n"] for row in rows.values()} == {24}
    assert {row["lungs"] for row in rows.values()} == {"mask 24"}
    assert all(-1 <= row["spearman"] <= 1 for row in rows.values())
    other = zones_csv(tmp_path / "other.csv", ["nothing.png"], lambda n, at: 1)
    with pytest.raises(UnusableData, match="none of its files is an image of the run"):
        reduce_run(open_run(str(swept)), str(images), Options(brixia=str(other)))


def test_zone_scores_are_the_mean_of_the_readers(tmp_path: Path) -> None:
    path = tmp_path / "zones.csv"
    path.write_text("file,S-A,S-B,S-C,S-D,S-E,S-F,J-A,J-B,J-C,J-D,J-E,J-F\na/x.png,0,1,2,3,0,1,1,1,1,1,1,1\n"
                    "b/y.png,3,3,3,3,3,3,,,,,,\n")  # fmt: skip
    found = read_zones(str(path), ["x.png", "b/y.png", "z.png"])
    np.testing.assert_allclose(found["x.png"], [0.5, 1, 1.5, 2, 0.5, 1])
    np.testing.assert_allclose(found["b/y.png"], 3)  # the junior reader gave no scores
    assert set(found) == {"x.png", "b/y.png"}
    path.write_text("file,S-A,S-B,S-C,S-D,S-E,S-F\nx.png,0,1,2,3,4,0\n")
    with pytest.raises(UnusableData, match="row 2: zone scores are numbers from 0 to 3"):
        read_zones(str(path), ["x.png"])
    path.write_text("file,x\nx.png,0\n")
    with pytest.raises(UnusableData, match=r"--brixia .*needs the columns file and S-A to S-F"):
        read_zones(str(path), ["x.png"])
    with pytest.raises(UnusableData, match=r"--sources .*cannot be read"):
        read_sources(str(tmp_path / "nowhere.csv"), [])


def test_images_meet_references_of_the_same_source(swept: Path, images: Path, tmp_path: Path) -> None:
    names = sorted(str(file.relative_to(images)) for file in images.glob("*/images/*.png"))
    path = tmp_path / "sources.csv"
    children = [name for n, name in enumerate(names) if n % 3]  # four of six images of each class
    path.write_text("file,source\n" + "".join(f"{name},children\n" for name in children))
    metrics = reduce_run(open_run(str(swept)), str(images), Options(sources=str(path))).metrics
    rows = [row for row in metrics["fid"] if "children" in row["set1"]]
    assert {row["set1"] for row in rows} == {"Normal of children (reference)"}
    assert {row["set2"] for row in rows} == {
        f"{label} of children (counterfactual) under strength {strength}"
        for label in ("COVID", "Lung_Opacity") for strength in ("0.3", "0.9")
    }  # fmt: skip
    assert {(row["n1"], row["n2"]) for row in rows} == {(4, 4)}


def test_external_judges_have_their_own_table(swept: Path, images: Path, model: Path, tables: dict) -> None:
    """The model's own judge, requested by name, gives the same probabilities as during generation."""
    metrics = reduce_run(open_run(str(swept)), str(images), Options(judges=(f"judge={model}",))).metrics
    assert metrics["validity"] == tables["validity"]
    own = {row["label"]: row for row in tables["validity"]}
    assert {row["label"] for row in metrics["external_validity"]} == set(own)
    for row in metrics["external_validity"]:
        same = own[row["label"]]
        assert (row["n"], row["flip_rate"]) == (same["n"], same["flip_rate"])
        assert row["confidence_gain"] == pytest.approx(same["confidence_gain"], abs=1e-6)
        assert row["judge"] == "judge of tiny"
    assert (swept / "tables" / "external_validity.md").exists()


def test_judges_in_folders_of_one_name_are_distinguished(
    swept: Path, images: Path, model: Path, tmp_path: Path
) -> None:
    """As in the documentation, the judges of two training seeds are in folders with the same name."""
    seeds = [tmp_path / seed / "model" for seed in ("s1", "s2")]
    for n, folder in enumerate(seeds):
        shutil.copytree(model / "judge", folder / "judge")
        weights = load_file(folder / "judge/model.safetensors")
        save_file({name: (1 - 2 * n) * tensor for name, tensor in weights.items()}, folder / "judge/model.safetensors")
    run, asked = open_run(str(swept)), tuple(f"judge={folder}" for folder in seeds)
    alone = [reduce_run(run, str(images), Options(judges=(one,))).metrics["external_validity"] for one in asked]
    both = reduce_run(run, str(images), Options(judges=asked)).metrics["external_validity"]
    assert [{**row, "judge": ""} for row in both] == [{**row, "judge": ""} for row in alone[0] + alone[1]]
    assert alone[0] != alone[1]
    assert len({row["judge"] for row in both}) == 2
    assert all(row["judge"] == f"judge of model ({row['weights_sha256'][:8]})" for row in both)
    assert "Validity, by judge of model (" in " ".join(t.title for t in report_tables({"external_validity": both}))


def test_a_judge_that_cannot_be_loaded_is_one_line(swept: Path) -> None:
    result = CliRunner().invoke(main, ["reduce", str(swept), "--executor", "inline", "--judge", "judge=nowhere"])
    assert result.exit_code == 2
    assert (
        result.output.strip()
        == "diffva reduce: --judge judge=nowhere: no judge there; name a model folder that has one"
    )
