"""Manifests as people have them: any names of columns, delimiters, encodings, roots and types."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from test_datasets import unusable, write

from diffva_ray.cli import main
from diffva_ray.config.recipe import ROLES, DataConfig, RecipeError, load_recipe
from diffva_ray.data import manifest as manifest_reader
from diffva_ray.data.columns import patient_key
from diffva_ray.data.dataset import Dataset, LabelledImage
from diffva_ray.data.datasets import open_dataset


def manifest(root: Path, text: str) -> Path:
    file = write(root, "images/a.png", "images/b c.png", "images/m.png") / "list.csv"
    file.write_text(text, encoding="utf-8")
    return file


def test_manifest_with_masks_missing_and_repeated_rows(tmp_path):
    file = manifest(
        tmp_path,
        "\ufeffpath,label,mask\n"
        "images/b c.png,Normal,\n"
        "./images/a.png, COVID,images/m.png\n"
        "images/a.png,COVID,\n"
        "images/a.png,Edema,images/none.png\n"
        "images\\b c.png,Edema,\n"
        "images/gone.png,COVID,\n",
    )
    dataset = open_dataset(file)
    assert dataset.kind == "manifest"
    assert dataset.images == [
        LabelledImage("images/a.png", "COVID", 1, lung_mask="images/m.png"),
        LabelledImage("images/a.png", "Edema", 1),
        LabelledImage("images/b c.png", "Edema", 1),
        LabelledImage("images/b c.png", "Normal", 1),
        LabelledImage("images/gone.png", "COVID", -1),
    ]
    assert dataset.remarks == [
        "1 images named in list.csv do not exist",
        "1 masks named in list.csv do not exist",
        "1 repeated rows of the same image and label are merged",
    ]


def test_manifest_in_parquet(tmp_path):
    manifest(tmp_path, "")
    table = pa.table({"path": ["images/a.png", "images/b c.png"], "label": [0, 1], "mask": ["images/m.png", None]})
    pq.write_table(table, tmp_path / "list.parquet")
    dataset = open_dataset(f"{tmp_path}/list.parquet")
    assert dataset.classes == {"0": 1, "1": 1}
    assert [image.lung_mask for image in dataset.images] == ["images/m.png", ""]


def test_condition_images_are_columns_of_the_images(tmp_path):
    """Paths below the root; by the name of the column or by the option; an absent one stays, for the record to name."""
    rows = "images/a.png,COVID,.\\images\\m.png,\nimages/b c.png,COVID,images/gone.png,images/m.png\n"
    file = manifest(tmp_path, f"path,label,condition.depth,drawn\n{rows}")
    config = DataConfig(columns="condition.sketch=drawn")
    dataset = open_dataset(file, config)
    assert [dict(image.columns) for image in dataset.images] == [
        {"condition.depth": "images/m.png"},
        {"condition.depth": "images/gone.png", "condition.sketch": "images/m.png"},
    ]
    assert "1 condition images named in list.csv do not exist" in dataset.notes
    with pytest.raises(ValueError, match="no such role: depth"):
        DataConfig(columns="depth=drawn")


@pytest.mark.parametrize(
    "path",
    ["../secret.png", "images/../../secret.png", "/etc/passwd", "C:\\images\\a.png", "s3://bucket/a.png", "..\\a.png"],
)
@pytest.mark.parametrize("column", ["path", "mask", "condition.depth"])
def test_manifest_stays_in_its_folder(tmp_path, path, column):
    cells = {"path": "images/a.png", "mask": "images/m.png", "condition.depth": "images/m.png"} | {column: path}
    row = f"{cells['path']},COVID,{cells['mask']},{cells['condition.depth']}"
    file = manifest(tmp_path, f"path,label,mask,condition.depth\n\n_images/a.png,COVID,,\n{row}\n")
    message = unusable(file)
    assert "list.csv row 4" in message
    assert repr(path.replace("\\", "/")) in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("path,label\n", "names no images"),
        ("where,what\na,b\n", "needs the columns path,label[,mask][,caption][,patient]; it has where,what; name them"),
        ("path,label\nimages/a.png,\n,COVID\n", "names no images (1 rows of list.csv without a label; 1 rows of"),
        ("path,label\nimages/a.png\n", "row 2: 1 cells under 2 columns"),
        ("path,label\na,b,c\n", "row 2: 3 cells under 2 columns"),
        ('path,label\n"images/a.png,COVID\n', "not a CSV"),
        ("\npath,label\nimages/a.png,COVID\n", "the first line is empty; it has to name the columns"),
    ],
)
def test_unusable_manifests_give_the_reason(tmp_path, text, message):
    assert message in unusable(manifest(tmp_path, text))


def test_manifests_that_are_not_tables(tmp_path):
    write(tmp_path, "list.csv", "list.parquet", "list.jsonl", content=b"\xff\xfe\x00 binary\xff")
    assert "UTF-8" in unusable(tmp_path / "list.csv")
    assert "Parquet" in unusable(tmp_path / "list.parquet")
    assert "list.jsonl line 1: not JSON" in unusable(tmp_path / "list.jsonl")
    assert "no such file" in unusable(tmp_path / "none.csv")
    write(tmp_path, "list.csv.gz", content=b"\x1f\x8bdamaged")
    assert "damaged gzip" in unusable(tmp_path / "list.csv.gz")


ROWS = [
    ("Path", "Finding", "Patient ID", "Note"),
    ("images/a.png", "Edema", "7", "x, y; z"),
    ("images/m.png", "", "8", ""),
]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be-bom", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_any_delimiter_and_encoding(tmp_path, encoding, delimiter, end):
    file = manifest(tmp_path, "")
    text = end.join(delimiter.join(f'"{cell}"' if " y;" in cell else cell for cell in row) for row in ROWS) + end
    file.write_bytes(b"\xfe\xff" + text.encode("utf-16-be") if encoding.endswith("bom") else text.encode(encoding))
    dataset = open_dataset(file)
    (image,) = dataset.images
    assert (image.path, image.label, image.patient) == ("images/a.png", "Edema", patient_key("7"))
    assert dict(image.columns) == {"Note": "x, y; z"}
    assert "1 rows of list.csv without a label" in dataset.left_out
    assert "columns of list.csv: image=Path, label=Finding, patient=Patient ID" in dataset.remarks


def test_columns_are_named_by_the_option_and_by_the_command(tmp_path):
    file = manifest(tmp_path, "wo,was,wer,label\nimages/a.png,Ödem,P1,zwei\n")
    config = DataConfig(columns={"image": "wo", "label": "was", "patient": "wer"})
    (image,) = open_dataset(file, config).images
    assert (image.label, image.patient) == ("Ödem", patient_key("P1"))
    assert dict(image.columns) == {"data_label": "zwei"}  # "label" is a column of the records
    text = "image=wo,label=was,patient=wer"
    assert load_recipe("phantom", [f"data.columns={text}"]).data.columns == config.columns
    output = CliRunner().invoke(main, ["inspect", str(file), "--columns", text]).output
    assert "Ödem: 1" in output
    assert "patients: 1" in output
    assert "list.csv: has no column Wo (data.columns); it has wo" in unusable(file, DataConfig(columns={"image": "Wo"}))
    for wrong, message in (("image", "write it as image=NAME"), ("bild=wo", "no such role: bild; there are image")):
        with pytest.raises(RecipeError, match=message):
            load_recipe("phantom", [f"data.columns={wrong}"])


def test_every_role_of_the_recipe_is_a_role_of_manifests():
    assert set(ROLES) == set(manifest_reader.ROLES)


def test_several_labels_in_a_cell_and_further_columns(tmp_path):
    file = manifest(
        tmp_path, "path,label,Age,SEX,View Position,site,status\nimages/a.png,Edema | Mass|,058Y,female,pa,Z,x\n"
    )
    dataset = open_dataset(file)
    assert dataset.classes == {"Edema": 1, "Mass": 1}
    columns = {"age": "58", "sex": "F", "view": "PA", "site": "Z", "data_status": "x"}
    assert [dict(image.columns) for image in dataset.images] == [columns, columns]


def test_names_without_folder_or_extension_are_found_when_they_are_unique(tmp_path):
    file = manifest(tmp_path, "path,label\na,Edema\nb c.png,Mass\nimages/a,COVID\n")
    assert [image.path for image in open_dataset(file).images] == ["images/a.png"] * 2 + ["images/b c.png"]
    write(tmp_path, "copy/a.png")
    assert "give the folder of one copy" in unusable(file)


def test_both_unicode_forms_meet(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Ödem/é.png") for form in ("NFC", "NFD"))
    for number, (on_disk, in_table) in enumerate([(composed, decomposed), (decomposed, composed)]):
        root = write(tmp_path / str(number), on_disk)
        (root / "list.csv").write_text(f"path,label\n{in_table},COVID\n", encoding="utf-8")
        (image,) = open_dataset(root / "list.csv").images
        assert (image.path, image.size) == (on_disk, 1)
    write(tmp_path / "two", composed, decomposed)
    assert len(open_dataset(tmp_path / "two").classes) == 1


def test_absolute_paths_below_the_table_or_a_root(tmp_path):
    file = manifest(tmp_path, "")
    file.write_text(f"path,label\n{tmp_path}/images/a.png,COVID\n{tmp_path}/images/b c.png,COVID\n")
    assert [image.path for image in open_dataset(file).images] == ["images/a.png", "images/b c.png"]
    elsewhere = tmp_path / "tables" / "list.csv"
    elsewhere.parent.mkdir()
    elsewhere.write_text(file.read_text() + "m.png,Normal\n")
    message = unusable(elsewhere)
    assert f"row 2: '{tmp_path}/images/a.png' is outside the folder {tmp_path}/tables (2 such paths)" in message
    assert "--root" in message
    dataset = open_dataset(elsewhere, DataConfig(root=f"{tmp_path}/images"))
    assert dataset.store.uri == f"{tmp_path}/images"
    assert [(image.path, image.size) for image in dataset.images] == [("a.png", 1), ("b c.png", 1), ("m.png", 1)]
    result = CliRunner().invoke(main, ["inspect", str(elsewhere), "--root", f"{tmp_path}/images", "--json"])
    assert json.loads(result.output)["files"] == 3


def test_parquet_with_any_other_columns(tmp_path):
    manifest(tmp_path, "")
    table = pa.table({
        "path": ["images/a.png", "images/m.png"],
        "label": [["Edema", "Mass"], None],
        "pixels": [b"\xff", b"\xfe"],
        "image": [{"bytes": b"x", "path": "a"}, None],
        "box": [[1, 2, 3, 4], None],
        "age": pa.array([61.0, None]),
        "kind": pa.array(["x", "y"]).dictionary_encode(),
    })  # fmt: skip
    pq.write_table(table, tmp_path / "list.parquet")
    dataset = open_dataset(tmp_path / "list.parquet")
    assert dataset.classes == {"Edema": 1, "Mass": 1}
    assert dict(dataset.images[0].columns) == {"box": "1|2|3|4", "age": "61", "kind": "x"}
    assert "2 columns of list.parquet that are neither text nor numbers (pixels, image)" in dataset.left_out


def test_cells_that_programs_write_for_nothing(tmp_path):
    rows = "images/a.png,nan,nan\nimages/b c.png,<NA>,\nimages/m.png,Edema,3.0\nimages/a.png,Mass,Anonymous\n"
    dataset = open_dataset(manifest(tmp_path, f"path,label,patient\n{rows}images/b c.png,Mass,3\n"))
    assert dataset.classes == {"Edema": 1, "Mass": 2}
    assert dataset.left_out == ["2 rows of list.csv without a label"]
    assert [image.patient for image in dataset.images] == ["", patient_key("3"), patient_key("3")]


def test_labels_that_are_probably_several_are_said(tmp_path):
    file = manifest(
        tmp_path, 'path,label\nimages/a.png,"Edema, Mass"\nimages/m.png,"[\'Edema\']"\nimages/a.png,COVID\n'
    )
    assert "2 labels such as 'Edema, Mass' are one class each; separate labels by |" in open_dataset(file).remarks
    assert open_dataset(manifest(tmp_path, "path,label\nimages/a.png,Edema|Mass\n")).remarks[:-1] == []


def test_the_line_with_which_excel_names_the_delimiter(tmp_path):
    assert open_dataset(manifest(tmp_path, "sep=;\npath;label\nimages/a.png;Edema\n")).classes == {"Edema": 1}


@pytest.mark.parametrize("path", ["/data/x/images/a.png", "C:\\data\\images\\a.png", "s3://bucket/images/a.png"])
def test_absolute_paths_of_another_machine_end_below_the_root(tmp_path, path):
    file = manifest(tmp_path, f"path,label\n{path},Edema\n")
    assert "give the images' folder with --root" in unusable(file)
    (image,) = open_dataset(file, DataConfig(root=str(tmp_path))).images
    assert (image.path, image.size) == ("images/a.png", 1)
    file.write_text("path,label\n/etc/passwd,Edema\n/x/../images/a.png,Edema\n")
    assert "'/etc/passwd' is outside the folder" in unusable(file, DataConfig(root=str(tmp_path)))
    assert "--root /none: no files there" in unusable(file, DataConfig(root="/none"))


@pytest.mark.parametrize("name", ["list.txt", "list.json", "list.xlsx"])
def test_tables_of_other_kinds_name_those_that_are_read(tmp_path, name):
    write(tmp_path, name)
    assert f"{name}: not read; save a table as one of .csv, .tsv" in unusable(tmp_path / name)


@pytest.mark.parametrize("name", ["list.jsonl", "list.ndjson"])
def test_json_lines(tmp_path, name):
    file = write(tmp_path, "a.png") / name
    file.write_text('{"file_name": "a.png", "label": ["Edema", "Mass"]}\n\n{"file_name": "b.png", "label": "Mass"}\n')
    dataset = open_dataset(file)
    assert dataset.classes == {"Edema": 1, "Mass": 2}
    assert f"1 images named in {name} do not exist" in dataset.remarks


def classes(root: Path, *labels: str, **config: object) -> Dataset:
    for number, label in enumerate(labels):
        write(root, f"{label}/{number}.png")
    return open_dataset(root, DataConfig(**config))


def test_spellings_and_synonyms_are_one_class_and_said(tmp_path):
    dataset = classes(
        tmp_path / "a", "lung opacity", "LUNG_OPACITY", "No Finding", "COVID-19", "Edema", "edema", "Edema "
    )
    assert dataset.classes == {"COVID": 1, "Edema": 3, "Lung_Opacity": 2, "Normal": 1}
    assert "'lung opacity' is class 'Lung_Opacity'" in dataset.remarks[0]
    assert "'No Finding' is class 'Normal'" in dataset.remarks[0]
    assert "'Edema'" not in dataset.remarks[0].replace("is class 'Edema'", "")
    assert classes(tmp_path / "b", "Effusion", "Normal").classes == {"Effusion": 1, "Normal": 1}  # nothing to unify
    merged = classes(tmp_path / "c", "Effusion", "Effusion", "Pleural Effusion", "Healthy", healthy_class="gesund")
    assert merged.classes == {"Effusion": 3, "gesund": 1}


def test_a_set_without_healthy_images_is_said(tmp_path):
    assert any("no class 'Normal'" in note for note in classes(tmp_path, "Edema").notes)
    assert not any("healthy" in note for note in classes(tmp_path, "Normal").notes)
