"""Public data sets are recognised as their hosts ship them, with patients, views, splits and their own truth."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import replicas
from click.testing import CliRunner
from PIL import Image

from diffva_ray.cli import main
from diffva_ray.config.recipe import DataConfig, load_recipe
from diffva_ray.data.columns import patient_key
from diffva_ray.data.dataset import Dataset, UnusableData
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.shapes import Box
from diffva_ray.generate.plan import Request, make_plan


class Expected(NamedTuple):
    """What a replica holds."""

    replica: Callable[[Path], None]
    kind: str
    classes: dict[str, int]
    patients: int = 0
    views: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    outlined: int = 0  # images with an outlined lesion
    said: tuple[str, ...] = ()  # parts of the notes
    masked: int = 0  # images with a file of a lesion mask


CHEXPERT = Expected(
    replicas.chexpert_small, "chexpert",
    {"Cardiomegaly": 1, "Enlarged Cardiomediastinum": 1, "Fracture": 1, "Lung_Opacity": 2, "Normal": 1},
    3, ("AP", "PA"), ("train", "val"), 0,
    ("1 lateral views", "2 uncertain labels (-1), policy 'ignore': Cardiomegaly 1, Edema 1"),
)  # fmt: skip
NIH_CLASSES = {"Cardiomegaly": 1, "Effusion": 1, "Hernia": 1, "Infiltration": 1, "Normal": 1}
SETS = [
    Expected(replicas.nih_kaggle, "nih-chestxray14", NIH_CLASSES, 3, ("AP", "PA"), ("test", "train"), 2,
             ("Data_Entry_2017.csv has the columns Image Index", "1 of 4 images do not exist")),
    Expected(replicas.nih_box, "nih-chestxray14", NIH_CLASSES, 3, ("AP", "PA"), (), 2,
             ("Data_Entry_2017_v2020.csv",)),
    Expected(replicas.rsna, "rsna-pneumonia",
             {"Lung_Opacity": 1, "No Lung Opacity / Not Normal": 1, "Normal": 1}, 3, (), ("train",), 1,
             ("1 images that no table names",)),
    CHEXPERT,
    CHEXPERT._replace(replica=replicas.chexpert_batches, said=("train_cheXbert.csv for others",)),
    Expected(replicas.radiography, "radiography", {"COVID": 1, "Lung_Opacity": 1, "Normal": 1, "Viral Pneumonia": 1}),
    Expected(replicas.kermany, "kermany", {"Normal": 3, "PNEUMONIA": 4}, 6, (), ("test", "train", "val"), 0,
             ("1 images outside these folders", "'NORMAL' is class 'Normal'")),
    Expected(replicas.vindr_physionet, "vindr-cxr",
             {"Cardiomegaly": 1, "Normal": 1, "Other diseases": 1, "Pleural effusion": 1, "Tuberculosis": 1}, 0, (),
             ("test", "train"), 2, ("at least 2 of its radiologists",)),
    Expected(replicas.vindr_png, "vindr-cxr", {"Cardiomegaly": 1, "Normal": 1}, 0, (), ("train",), 1),
    Expected(replicas.mimic, "mimic-cxr-jpg", {"Lung_Opacity": 1, "Pneumonia": 1}, 1, ("PA",), ("train",), 1,
             ("1 lateral views", "1 uncertain labels (-1), policy 'ignore': Edema 1")),
    Expected(replicas.siim, "siim-acr-pneumothorax", {"No Pneumothorax": 1, "Pneumothorax": 1}, 0, (), ("train",), 1,
             ("1 images that no table names", "is not healthy")),
    Expected(replicas.chexlocalize, "chexlocalize",
             {"Cardiomegaly": 1, "Enlarged Cardiomediastinum": 1, "Lung_Opacity": 1, "Normal": 1}, 2, (), ("val",), 1),
    Expected(replicas.padchest, "padchest", {"kyphosis": 1, "pulmonary fibrosis": 1}, 1, ("PA",), (), 0,
             ("1 views that are not frontal", "no image is healthy")),
    Expected(replicas.chestxdet, "chestx-det", {"Effusion": 1, "Fracture": 1, "Normal": 1}, 0, (), ("test", "train"),
             2),
    Expected(replicas.huggingface, "image-folder", {"COVID": 1, "Edema": 1, "Mass": 1, "Normal": 1}, 0, (),
             ("test", "train")),
    Expected(replicas.huggingface_parquet, "parquet-images", {"COVID": 3, "Normal": 3}, 3, (), ("test", "train"), 0,
             ("2 Parquet files with images in the column image",), 3),
    Expected(replicas.webdataset, "webdataset", {"COVID": 2, "Normal": 2}, 2, (), ("test", "train"), 0,
             ("2 tar archives",), 2),
    Expected(replicas.imagefolder, "split-folders", {"Edema": 3, "Normal": 2}, 0, (), ("test", "train", "val"), 2,
             ("test|train|val/<class>", "2 boxes on 2 images")),
]  # fmt: skip
NAMES = [expected.replica.__name__ for expected in SETS]


@pytest.mark.parametrize("expected", SETS, ids=NAMES)
def test_the_guide_lists_the_set(expected: Expected) -> None:
    guide = (Path(__file__).parents[3] / "docs" / "guides" / "datasets.md").read_text()
    assert f"`{expected.kind}`" in guide


def column(dataset: Dataset, name: str) -> tuple[str, ...]:
    return tuple(sorted({image.columns[name] for image in dataset.images if name in image.columns}))


def unusable(folder: Path) -> str:
    with pytest.raises(UnusableData) as caught:
        open_dataset(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("expected", SETS, ids=NAMES)
@pytest.mark.parametrize("above", ["", "unpacked here"])
def test_what_a_data_set_holds_is_found_without_an_option(expected: Expected, above: str, tmp_path: Path) -> None:
    if above and expected.replica in (replicas.kermany, replicas.radiography, replicas.chexpert_small):
        pytest.skip("this replica has a folder above it already")
    expected.replica(tmp_path / above)
    dataset = open_dataset(tmp_path)
    assert dataset.kind == expected.kind
    assert dataset.classes == expected.classes
    assert len({image.patient for image in dataset.images if image.patient}) == expected.patients
    assert column(dataset, "view") == expected.views
    assert column(dataset, "split") == expected.splits
    assert len(dataset.shapes) == expected.outlined
    assert sum(bool(image.lesion_mask) for image in dataset.images) == expected.masked
    notes = "\n".join([dataset.why, *dataset.notes])
    assert all(text in notes for text in expected.said), notes
    labels = {(image.path, image.label) for image in dataset.images}
    outlined = {(path, shape.label) for path, shapes in dataset.shapes.items() for shape in shapes if shape.label}
    assert outlined <= labels
    assert all(dataset.store.read(image.path) for image in dataset.images if image.size >= 0)


def test_lesions_are_where_the_hosts_say(tmp_path: Path) -> None:
    def mask(replica: Callable[[Path], None], label: str, width: int, height: int) -> np.ndarray:
        folder = tmp_path / replica.__name__
        replica(folder)
        dataset = open_dataset(folder)
        (path,) = {image.path for image in dataset.images if image.label == label}
        shapes = dataset.lesion_shapes(path, label)
        masks = [shape.mask(shape.width or width, shape.height or height) for shape in shapes]
        squares = [Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST) for mask in masks]
        return np.logical_or.reduce([np.asarray(square) for square in squares])

    nih = mask(replicas.nih_kaggle, "Infiltration", 64, 64)  # a copy of 64 pixels; boxes are in pixels of 1024
    assert np.argwhere(nih).min(axis=0).tolist() == [16, 32]
    assert nih.sum() == 8 * 4
    siim = mask(replicas.siim, "Pneumothorax", 1024, 1024)
    assert {(0, 100), (0, 101), (1, 100), (1, 101)} <= set(map(tuple, np.argwhere(siim.T).tolist()))
    assert siim.sum() == 5  # the second mask of the image has one pixel, at (1, 0)
    assert siim[0, 1]
    coco = mask(replicas.chexlocalize, "Cardiomegaly", 3, 4)
    assert coco.T.ravel().astype(int).tolist() == [0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1]
    triangle = mask(replicas.chestxdet, "Fracture", 64, 64)
    assert triangle[11, 11]
    assert not triangle[49, 49]
    vindr = mask(replicas.vindr_png, "Cardiomegaly", 254, 307)  # the original has 2540 x 3072 pixels
    assert np.argwhere(vindr).min(axis=0).tolist() == [137, 69]


def test_one_finding_is_not_scored_with_the_box_of_another(tmp_path: Path) -> None:
    replicas.nih_kaggle(tmp_path)
    dataset = open_dataset(tmp_path)
    path = "images_001/images/00000001_000.png"
    assert [shape.label for shape in dataset.lesion_shapes(path, "Cardiomegaly")] == ["Cardiomegaly"]
    assert dataset.lesion_shapes(path, "Effusion") == []
    replicas.vindr_physionet(tmp_path / "v")
    shapes = open_dataset(tmp_path / "v").shapes.values()
    assert sorted([(box.x, box.y, box.w, box.h) for box in found if isinstance(box, Box)] for found in shapes) == [
        [pytest.approx((13.82, 27.5, 19.24, 9.12)), pytest.approx((14, 27.6, 18, 8.4))],
        [pytest.approx((18.5, 11.5, 5.5, 6.5))],
    ]


def test_patients_are_hashed_and_columns_are_in_the_same_words(tmp_path: Path) -> None:
    replicas.nih_kaggle(tmp_path)
    image = next(image for image in open_dataset(tmp_path).images if image.label == "Effusion")
    assert image.patient == patient_key("1", "nih-chestxray14") != "1"
    assert dict(image.columns) == {
        "age": "58",
        "sex": "M",
        "view": "PA",
        "split": "train",
    }  # its spacing is of the original


def test_boxes_of_a_copy_of_unknown_size_are_left_out(tmp_path: Path) -> None:
    replicas.vindr_png(tmp_path)
    (tmp_path / "train_meta.csv").unlink()
    dataset = open_dataset(tmp_path)
    assert dataset.shapes == {}
    assert any("2 boxes on copies whose original size is unknown" in text for text in dataset.left_out)


def test_the_policy_for_uncertain_labels_holds_for_both_sets_of_that_labeller(tmp_path: Path) -> None:
    for replica in (replicas.chexpert_small, replicas.mimic):
        replica(tmp_path / replica.__name__)
        positive = open_dataset(tmp_path / replica.__name__, DataConfig(uncertain="positive"))
        assert "Edema" in positive.classes


@pytest.mark.parametrize(
    ("replica", "removed", "message"),
    [
        (replicas.nih_kaggle, ["Data_Entry_2017.csv"], "NIH ChestX-ray14, but Data_Entry_2017.csv"),
        (replicas.nih_box, ["Data_Entry_2017_v2020.csv"], "NIH ChestX-ray14, but Data_Entry_2017.csv"),
        (replicas.rsna, ["stage_2_train_labels.csv"], "RSNA Pneumonia 2018, but stage_2_train_labels.csv"),
        (replicas.siim, ["train-rle.csv"], "SIIM-ACR Pneumothorax, but train-rle.csv"),
        (replicas.vindr_physionet, ["annotations"], "VinDr-CXR, but annotations/annotations_train.csv"),
        (replicas.mimic, ["mimic-cxr-2.0.0-chexpert.csv.gz"], "MIMIC-CXR-JPG, but mimic-cxr-2.0.0-chexpert.csv.gz"),
        (
            replicas.padchest,
            ["PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz"],
            "PadChest, but PADCHEST_chest",
        ),
        (replicas.chexlocalize, ["CheXpert/val_labels.csv"], "CheXlocalize, but val_labels.csv or test_labels.csv"),
        (
            replicas.chexpert_small,
            ["CheXpert-v1.0-small/train.csv", "CheXpert-v1.0-small/valid.csv"],
            "CheXpert, but train.csv or valid.csv",
        ),
        (replicas.mimic, ["mimic-cxr-2.0.0-metadata.csv.gz"], "MIMIC-CXR-JPG, but mimic-cxr-2.0.0-metadata.csv.gz"),
        (replicas.vindr_png, ["train.csv"], "VinDr-CXR, but annotations/annotations_train.csv (Kaggle: train.csv)"),
        (
            replicas.chestxdet,
            ["ChestX_Det_train.json", "ChestX_Det_test.json"],
            "ChestX-Det, but ChestX_Det_train.json or ChestX_Det_test.json is missing, which holds labels and polygons",
        ),
        (replicas.nih_kaggle, ["images_001", "images_002", "images_003"], "none of its 4 images exists"),
    ],
)
def test_an_incomplete_set_says_what_is_missing(
    replica: Callable[[Path], None], removed: list[str], message: str, tmp_path: Path
) -> None:
    replica(tmp_path)
    for name in removed:
        path = tmp_path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert message in unusable(tmp_path)


@pytest.mark.parametrize(
    ("replica", "removed", "remark"),
    [
        (replicas.nih_kaggle, ["BBox_List_2017.csv"], "missing BBox_List_2017.csv; no lesion is outlined"),
        (replicas.nih_box, [], "missing train_val_list.txt and test_list.txt; the official split is unknown"),
        (replicas.rsna, ["stage_2_detailed_class_info.csv"], "missing stage_2_detailed_class_info.csv; no image is"),
        (replicas.mimic, ["mimic-cxr-2.0.0-split.csv.gz"], "missing mimic-cxr-2.0.0-split.csv.gz; the official"),
        (replicas.mimic, ["ms-cxr"], "missing MS_CXR_Local_Alignment_v1.0.0.csv (of MS-CXR); no lesion is outlined"),
        (replicas.chexlocalize, ["CheXlocalize"], "missing gt_segmentations_val.json; no lesion of the val images"),
        (replicas.chexpert_small, ["CheXpert-v1.0-small/train.csv"], "missing the table of split train; its images"),
        (replicas.chexpert_batches, ["train_cheXbert.csv", "CheXpert-v1.0 batch 1 (validate & csv)/train.csv"],
         "missing the table of split train; its images"),
        (replicas.vindr_physionet, ["annotations/annotations_test.csv"], "missing annotations_test.csv; the images"),
        (replicas.vindr_physionet, ["annotations/image_labels_train.csv"], "missing image_labels_train.csv; diagno"),
        (replicas.chestxdet, ["ChestX_Det_test.json"], "missing ChestX_Det_test.json; the images of test have no"),
        (replicas.kermany, ["chest_xray/val"], "missing val/; its images are left out"),
        (replicas.radiography, ["COVID-19_Radiography_Dataset/COVID"], "missing COVID/images; these classes are"),
        (replicas.radiography, ["COVID-19_Radiography_Dataset/COVID/masks"], "missing COVID/masks; maps are scored"),
    ],
)  # fmt: skip
def test_what_an_incomplete_set_lacks_is_said_with_its_cost(
    replica: Callable[[Path], None], removed: list[str], remark: str, tmp_path: Path
) -> None:
    replica(tmp_path)
    if removed:
        assert "incomplete" not in "\n".join(open_dataset(tmp_path).remarks)
    for name in removed:
        path = tmp_path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert f"incomplete: {remark}" in "\n".join(open_dataset(tmp_path).remarks)


@pytest.mark.parametrize("paths", [["train/a.png", "test/b.png"], ["train/images/a.png", "Valid/images/b.png"]])
def test_folders_of_splits_are_no_classes(paths: list[str], tmp_path: Path) -> None:
    replicas.image(tmp_path, *paths)
    assert "are splits, not classes; a table with the labels of the images" in unusable(tmp_path)


def test_patients_of_two_sets_that_number_them_alike_are_not_one(tmp_path: Path) -> None:
    replicas.nih_kaggle(tmp_path / "nih")
    replicas.padchest(tmp_path / "padchest")
    table = tmp_path / "padchest" / replicas.PADCHEST_TABLE
    table.write_bytes(gzip.compress(gzip.decompress(table.read_bytes()).replace(b",8398,", b",1,")))
    (tmp_path / "nih" / "own.csv").write_text("path,label,patient\n00000001_000.png,Effusion,1\n")

    def compared(*sets: str) -> tuple[dict[str, Any], str]:
        words = ["inspect", *(str(tmp_path / name) for name in sets)]
        common = json.loads(CliRunner().invoke(main, [*words, "--json"]).output)["overlap"]
        return common, CliRunner().invoke(main, words).output

    common, text = compared("nih", "padchest")
    assert (common["patients"], common["patients_comparable"]) == ([], False)
    assert "patients in both: unknown, as each data set numbers its patients itself" in text
    common, text = compared("nih", "nih/own.csv")
    assert (common["patients"], common["patients_comparable"]) == ([], False)
    assert common["equal_files"]
    common, text = compared("nih/own.csv", "nih/own.csv")
    assert common["patients"] == [patient_key("1")]
    # an own table may say whose numbers it has
    (tmp_path / "nih" / "own.csv").write_text("path,label,patient\n00000001_000.png,Effusion,nih-chestxray14:1\n")
    common, text = compared("nih", "nih/own.csv")
    assert common["patients"] == [patient_key("1", "nih-chestxray14")]
    assert "patients in both: 1 (of 3 and 1)" in text


def test_one_split_of_kermany_has_the_patients_of_the_whole(tmp_path: Path) -> None:
    replicas.kermany(tmp_path)
    whole = open_dataset(tmp_path)
    for split in ("train", "test"):
        part = open_dataset(tmp_path / "chest_xray" / split)
        expected = [(image.label, image.patient) for image in whole.images if image.columns["split"] == split]
        assert [(image.label, image.patient) for image in part.images] == expected
        assert part.issuer == whole.issuer == "kermany"


def test_reports_of_mimic_lie_among_its_images_and_enter_no_plan(tmp_path: Path) -> None:
    replicas.mimic(tmp_path)
    assert "report" not in open_dataset(str(tmp_path)).images[0].columns
    path = "files/p10/p10000032/s50414267.txt"
    (tmp_path / path).write_text("IMPRESSION: No acute process.")
    dataset = open_dataset(str(tmp_path))
    assert {image.columns["report"] for image in dataset.images} == {path}
    table = make_plan(dataset, load_recipe("phantom"), Request())
    assert "report" not in table.column_names


@pytest.mark.parametrize("replica", [replicas.mimic, replicas.vindr_physionet])
def test_what_the_host_s_wget_line_makes_is_read_from_its_top(replica: Callable[[Path], None], tmp_path: Path) -> None:
    replica(tmp_path / "plain")
    replica(tmp_path / "physionet.org" / "files" / "name" / "2.0.0")
    plain, deep = open_dataset(tmp_path / "plain"), open_dataset(tmp_path / "physionet.org")
    assert (deep.kind, deep.classes, len(deep.shapes)) == (plain.kind, plain.classes, len(plain.shapes))


def test_a_set_that_is_mostly_absent_is_taken_as_far_as_it_goes(tmp_path: Path) -> None:
    replicas.nih_kaggle(tmp_path)
    for name in ("images_002", "images_003"):
        shutil.rmtree(tmp_path / name)
    dataset = open_dataset(tmp_path)
    assert {image.path for image in dataset.images} == {"images_001/images/00000001_000.png"}
    assert any("3 of 4 images, which are not there" in text for text in dataset.left_out)


def test_images_that_no_table_names_are_counted(tmp_path: Path) -> None:
    replicas.nih_kaggle(tmp_path)
    replicas.image(tmp_path, "other set/a.png", "b.png")
    assert "2 images that no table names (b.png, other set)" in open_dataset(tmp_path).left_out


def test_a_set_beside_its_copy_is_refused(tmp_path: Path) -> None:
    replicas.nih_kaggle(tmp_path)
    shutil.copytree(tmp_path / "images_001", tmp_path / "small")
    assert "give the folder of one copy" in unusable(tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "BBox_List_2017.csv",
            "Image Index,Finding Label,Bbox [x,y,w,h]\na.png,Mass,1,2,3,x\n",
            "row 2: 1,2,3,x is not",
        ),
        ("BBox_List_2017.csv", "Image Index,x\n", "lacks the columns Finding Label"),
        ("Data_Entry_2017.csv", "Image Index,Labels\n", "lacks the columns Finding Labels; it has Image Index, Labels"),
    ],
)
def test_an_invalid_table_names_its_row(file: str, text: str, message: str, tmp_path: Path) -> None:
    replicas.nih_kaggle(tmp_path)
    (tmp_path / file).write_text(text)
    assert message in unusable(tmp_path)


def test_invalid_masks_name_their_place(tmp_path: Path) -> None:
    replicas.siim(tmp_path / "s")
    (tmp_path / "s" / "train-rle.csv").write_text(f"ImageId, EncodedPixels\n{replicas.SIIM[0]},1 2 3\n")
    assert "train-rle.csv row 2: EncodedPixels" in unusable(tmp_path / "s")
    replicas.chexlocalize(tmp_path / "c")
    broken = {"patient64541_study1_view1_frontal": {"Cardiomegaly": {"size": [4, 3], "counts": "~"}}}
    (tmp_path / "c" / "CheXlocalize" / "gt_segmentations_val.json").write_text(json.dumps(broken))
    assert "patient64541_study1_view1_frontal: Cardiomegaly: not a mask" in unusable(tmp_path / "c")


@pytest.mark.parametrize("expected", SETS, ids=NAMES)
def test_inspect_prints_it(expected: Expected, tmp_path: Path) -> None:
    expected.replica(tmp_path)
    result = CliRunner().invoke(main, ["inspect", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert f": {expected.kind}, " in result.output
    assert "recognised by: " in result.output
    assert all(f"  {label}: {count}" in result.output for label, count in expected.classes.items())
    summary = json.loads(CliRunner().invoke(main, ["inspect", str(tmp_path), "--json"]).output)
    assert (summary["with_outlined_lesion"], summary["with_lesion_mask"]) == (expected.outlined, expected.masked)
    assert not [bad for bad in summary["unreadable"] if bad["status"] != "missing"]
