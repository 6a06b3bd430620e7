"""Each layout is recognised from its root or the folder above, with one listing, and in any store."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diffva_ray.config.recipe import DataConfig
from diffva_ray.data import boxes, datasets
from diffva_ray.data.dataset import LabelledImage, UnusableData, companions
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.shapes import Box
from diffva_ray.storage.local import LocalStore
from diffva_ray.storage.store import Entry

KAGGLE = "COVID-19_Radiography_Dataset"
PACK = Path(__file__).parents[4] / "shared" / "data"


def write(root: Path, *paths: str, content: bytes = b"x") -> Path:
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return root


def radiography(root: Path) -> Path:
    return write(
        root,
        "COVID/images/COVID-1.png",
        "COVID/masks/COVID-1.png",
        "COVID/images/COVID-2.PNG",
        "Normal/images/Normal-1.jpg",
        "Normal/masks/Normal-1.png",
        "Normal/images/notes.txt",
        "Normal/images/._Normal-1.jpg",
        "Normal.metadata.xlsx",
    )


def unusable(uri, *arguments, **options) -> str:
    with pytest.raises(UnusableData) as caught:
        open_dataset(uri, *arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_radiography_layout(tmp_path):
    dataset = open_dataset(radiography(tmp_path))
    assert dataset.kind == "radiography"
    assert dataset.classes == {"COVID": 2, "Normal": 1}
    assert dataset.images == [
        LabelledImage("COVID/images/COVID-1.png", "COVID", 1, lung_mask="COVID/masks/COVID-1.png"),
        LabelledImage("COVID/images/COVID-2.PNG", "COVID", 1),
        LabelledImage("Normal/images/Normal-1.jpg", "Normal", 1, lung_mask="Normal/masks/Normal-1.png"),
    ]
    assert dataset.store.read(dataset.images[0].path) == b"x"


def test_radiography_from_the_folder_above_ignores_and_reports_the_rest(tmp_path):
    radiography(tmp_path / KAGGLE)
    radiography(tmp_path / "train_extra" / KAGGLE)
    radiography(tmp_path / "other")
    write(tmp_path, "hires/COVID/COVID-1.png")
    dataset = open_dataset(str(tmp_path))
    assert dataset.kind == "radiography"
    assert {image.path.split("/")[0] for image in dataset.images} == {KAGGLE}
    assert dataset.images[0].lung_mask == f"{KAGGLE}/COVID/masks/COVID-1.png"
    assert any("images outside the layout (hires, other, train_extra)" in note for note in dataset.left_out)


def test_several_sets_side_by_side_are_refused(tmp_path):
    radiography(tmp_path / "train")
    radiography(tmp_path / "test")
    assert "(test, train)" in unusable(tmp_path)


def test_phantoms_have_lesions_and_ground_truth_counterfactuals(tmp_path):
    write(tmp_path, "phantoms.json", "COVID/images/p1.png", "COVID/masks/p1.png")
    write(tmp_path, "COVID/lesions/p1.png", "COVID/ground_truth/p1.png", "Normal/images/p2.png")
    dataset = open_dataset(tmp_path)
    assert dataset.kind == "phantoms"
    image, healthy = dataset.images
    assert (image.lung_mask, image.lesion_mask, image.ground_truth) == (
        "COVID/masks/p1.png",
        "COVID/lesions/p1.png",
        "COVID/ground_truth/p1.png",
    )
    assert (healthy.lesion_mask, healthy.ground_truth) == ("", "")


def test_folder_per_class(tmp_path):
    write(tmp_path, "sick/a.png", "well/b.TIF", "well/c.dcm", "well/masks/b.png", "stray.png", "well/deep/d.png")
    dataset = open_dataset(tmp_path)
    assert dataset.kind == "folder"
    assert dataset.classes == {"sick": 1, "well": 2}
    assert dataset.images[1].lung_mask == "well/masks/b.png"
    assert dataset.left_out == ["2 images outside the class folders"]


@pytest.mark.parametrize(
    ("name", "mask"),
    [("1.jpg", "1.png"), ("IM000001", "IM000001.png"), ("1.2.840.113", "1.2.840.113.png"), ("a.b.DCM", "a.b.png")],
)
def test_the_mask_of_an_image_of_any_ending_is_a_png(name, mask):
    assert f"COVID/masks/{mask}" in companions(f"COVID/images/{name}", "masks")


def test_the_folder_of_one_class_is_refused(tmp_path):
    assert "folder above" in unusable(radiography(tmp_path) / "COVID")


def test_names_may_be_anything(tmp_path):
    names = [
        "ein Befund (1).png",
        "胸部\u00e9.png",
        "two\nlines.png",
        "a'b\"c,d.png",
        "-rf.png",
        "100%#?.png",
        "x..png",
    ]
    write(tmp_path, *(f"Klasse mit\nÜ/images/{name}" for name in names))
    write(tmp_path, f"Klasse mit\nÜ/masks/{names[2]}")
    dataset = open_dataset(tmp_path)
    assert dataset.classes == {"Klasse mit\nÜ": len(names)}
    assert [image.path.split("/")[-1] for image in dataset.images] == sorted(names)
    assert sum(bool(image.lung_mask) for image in dataset.images) == 1
    assert all(dataset.store.read(image.path) for image in dataset.images)


def test_names_that_are_not_utf_8_are_ignored_and_reported(tmp_path):
    write(tmp_path, "COVID/images/a.png")
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/COVID/images/\xff.png")).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system refuses such names")
    dataset = open_dataset(tmp_path)
    assert len(dataset.images) == 1
    assert any("not UTF-8" in note for note in dataset.notes)


HEADER = "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Cardiomegaly,Lung Opacity\n"


def chexpert(root: Path) -> Path:
    folder = "CheXpert-v1.0-small/train"
    write(root, *(f"train/patient0000{n}/study1/view1_frontal.jpg" for n in (1, 2, 3, 4)))
    write(root, "train/patient00001/study1/view2_lateral.jpg")
    (root / "train.csv").write_text(
        HEADER
        + f"{folder}/patient00001/study1/view1_frontal.jpg,F,68,Frontal,AP,1.0,,\n"
        + f"{folder}/patient00001/study1/view2_lateral.jpg,F,68,Lateral,,1.0,,\n"
        + f"{folder}/patient00002/study1/view1_frontal.jpg,M,50,Frontal,PA,,1.0,1.0\n"
        + f"{folder}/patient00003/study1/view1_frontal.jpg,M,51,Frontal,PA,,-1.0,1.0\n"
        + f"{folder}/patient00004/study1/view1_frontal.jpg,M,52,Frontal,PA,0.0,-1.0,\n"
        + f"{folder}/patient00005/study1/view1_frontal.jpg,M,53,Frontal,PA,,,1.0\n"
    )
    (root / "valid.csv").write_text(HEADER + "CheXpert-v1.0-small/valid/p/view1_frontal.jpg,F,1,Frontal,AP,1,0,0\n")
    return root


@pytest.mark.parametrize("above", ["", "CheXpert-v1.0-small/", "renamed/"])
def test_chexpert_is_one_image_per_positive_label(tmp_path, above):
    chexpert(tmp_path / above)
    dataset = open_dataset(tmp_path)
    assert dataset.kind == "chexpert"
    assert dataset.classes == {"Cardiomegaly": 1, "Lung_Opacity": 3, "Normal": 1}
    sizes = {image.path.rpartition("train/")[2]: image.size for image in dataset.images}
    assert sizes.pop("patient00005/study1/view1_frontal.jpg") == -1
    assert set(sizes.values()) == {1}
    assert f"{above}train/patient00001/study1/view1_frontal.jpg" in {image.path for image in dataset.images}
    notes = "\n".join(dataset.notes)
    assert "'No Finding' is class 'Normal'" in notes
    assert "2 uncertain labels (-1), policy 'ignore': Cardiomegaly 2" in notes
    assert "left out: 1 lateral views" in notes
    assert "1 images without a positive label" in notes
    assert "1 of 4 images do not exist" in notes
    assert "left out: 1 images of valid.csv, none of which exists" in notes


def test_chexpert_policies_and_healthy_class(tmp_path):
    chexpert(tmp_path)
    positive = open_dataset(tmp_path, DataConfig(uncertain="positive", healthy_class="Healthy"))
    assert positive.classes == {"Cardiomegaly": 3, "Healthy": 1, "Lung_Opacity": 3}
    assert open_dataset(tmp_path, DataConfig(uncertain="negative")).images == open_dataset(tmp_path).images


def test_chexpert_table_alone(tmp_path):
    chexpert(tmp_path)
    write(tmp_path, "valid/p/view1_frontal.jpg")
    assert open_dataset(tmp_path).classes["Normal"] == 2
    assert open_dataset(tmp_path / "valid.csv").classes == {"Normal": 1}


def test_chexpert_with_odd_values_or_no_images(tmp_path):
    csv = HEADER + "CheXpert-v1.0-small/train/a_frontal.jpg,F,68,Frontal,AP,2,,\n"
    write(tmp_path, "train.csv", content=csv.encode())
    write(tmp_path, "train/a_frontal.jpg")
    assert "train.csv row 2: No Finding is '2'" in unusable(tmp_path)
    write(tmp_path, "train.csv", content=csv.replace(",2,", ",1,").encode())
    (tmp_path / "train/a_frontal.jpg").unlink()
    assert "1 images of train.csv, none of which exists" in unusable(tmp_path)


def test_no_data_names_the_layouts(tmp_path):
    for uri in (tmp_path / "absent", tmp_path):
        message = unusable(uri)
        assert str(uri) in message
        assert "<class>/images/*.png" in message
        assert "CheXpert" in message
        assert "path,label" in message
    assert "expected" in unusable(write(tmp_path, "one.png", "a/b/c/d.png"))
    assert "unknown scheme" in unusable("ftp://host/data")
    assert "a single image is no data set; give its folder" in unusable(tmp_path / "one.png")


def test_classes_filter_images_and_boxes(tmp_path):
    radiography(tmp_path)
    write(tmp_path, "boxes.csv", content=b"file,x,y,w,h\nCOVID-1.png,1,2,3,4\n")
    assert open_dataset(tmp_path, classes=["COVID"]).shapes == {"COVID/images/COVID-1.png": [Box(x=1, y=2, w=3, h=4)]}
    normal = open_dataset(tmp_path, classes=["Normal"])
    assert normal.classes == {"Normal": 1}
    assert normal.shapes == {}
    message = unusable(tmp_path, classes=["Normal", "Covid"])
    assert "'Covid'" in message
    assert "COVID, Normal" in message


def test_boxes_beside_or_inside_the_data_set(tmp_path):
    rows = f"file,x,y,w,h,reader\n{KAGGLE}/COVID/images/COVID-1.png,1,2,3,4,A\nCOVID/images/COVID-1.png,5,6,7.5,8,B\n"
    rows += f"{KAGGLE}/COVID/images/other.png,1,1,1,1,A\n{KAGGLE}/Normal/images/Normal-1.jpg,,,,,A\n"
    root = radiography(tmp_path / KAGGLE)
    expected = [Box(x=1, y=2, w=3, h=4), Box(x=5, y=6, w=7.5, h=8)]
    write(tmp_path, "boxes.csv", content=rows.encode())
    outer = open_dataset(tmp_path)
    assert outer.shapes == {f"{KAGGLE}/COVID/images/COVID-1.png": expected}
    assert "2 boxes on 1 images (boxes.csv); 1 match no image" in outer.notes
    inner = open_dataset(root)
    assert inner.shapes == {}
    assert boxes.read_boxes(rows.encode(), inner.images) == {"COVID/images/COVID-1.png": expected}
    write(root, "boxes.csv", content=rows.encode())
    assert open_dataset(root).shapes == {"COVID/images/COVID-1.png": expected}


def test_boxes_do_not_cross_classes():
    images = [LabelledImage("COVID/images/1.png", "COVID"), LabelledImage("Normal/images/1.png", "Normal")]
    header = b"file,x,y,w,h\n"
    assert boxes.read_boxes(header + b"Viral/images/1.png,1,2,3,4\n", images) == {}
    with pytest.raises(UnusableData, match=r"row 2: '1\.png' matches 2 images"):
        boxes.read_boxes(header + b"1.png,1,2,3,4\n", images)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1,2,3", "cells"),
        ("1,2,x,4", "not x,y,w,h"),
        ("1,2,0,4", "above 0"),
        ("nan,2,3,4", "not a box"),
        ("1,,3,4", "x,y"),
    ],
)
def test_bad_boxes_name_their_row(row, message):
    with pytest.raises(UnusableData, match=f"boxes.csv row 2.*{message}"):
        boxes.read_boxes(f"file,x,y,w,h\na.png,{row}\n".encode(), [LabelledImage("a.png", "a")])
    with pytest.raises(UnusableData, match="needs the columns file,x,y,w,h"):
        boxes.read_boxes(b"file,x,y,width,height\n", [])


class CountingStore:
    """A store in memory that, like S3, is not a local folder."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.uri = "s3://bucket/data"
        self.files = files
        self.listings = 0

    def list(self, prefix: str = "") -> list[Entry]:
        self.listings += 1
        return sorted(Entry(path, len(data)) for path, data in self.files.items())

    def read(self, path: str) -> bytes:
        return self.files[path]


def table(root: Path) -> Path:
    return write(root, "images/a.png", "list.csv", content=b"path,label\nimages/a.png,A\n") / "list.csv"


@pytest.mark.parametrize("layout", [radiography, chexpert, table])
def test_any_store_serves_and_is_listed_once(tmp_path, monkeypatch, layout):
    root = layout(tmp_path)
    local = open_dataset(root)
    files = LocalStore(str(tmp_path))
    store = CountingStore({entry.path: files.read(entry.path) for entry in files.list()})
    opened = []
    monkeypatch.setattr(datasets, "open_store", lambda uri: opened.append(uri) or store)
    remote = open_dataset("s3://bucket/data" + (f"/{root.name}" if root.is_file() else ""))
    assert remote.images == local.images
    assert opened == ["s3://bucket/data"]
    assert store.listings == 1


def test_unreadable_stores_are_unusable_data(monkeypatch):
    class Refusing(CountingStore):
        def list(self, prefix: str = "") -> list[Entry]:
            raise PermissionError("Access Denied")

    monkeypatch.setattr(datasets, "open_store", lambda uri: Refusing({}))
    assert "Access Denied" in unusable("s3://bucket/data")


@pytest.mark.skipif(not PACK.is_dir(), reason=f"no pack of real images at {PACK}")
def test_pack_of_real_images():
    dataset = open_dataset(PACK)
    assert dataset.classes == {"COVID": 51, "Lung_Opacity": 75, "Normal": 126, "Viral Pneumonia": 59}
    assert len(dataset.shapes) == 75
    assert sum(map(len, dataset.shapes.values())) == 121
    assert sum(bool(image.lung_mask) for image in dataset.images) == 44
