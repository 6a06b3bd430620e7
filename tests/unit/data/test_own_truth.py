"""A public data set goes from the download to tables: its patients, columns and outlines are used without an option."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import replicas
from click.testing import CliRunner, Result
from test_readers import NAMES, SETS, Expected

from diffva_ray.cli import main
from diffva_ray.data.columns import patient_key
from diffva_ray.data.dataset import Dataset
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.masks import read_mask
from diffva_ray.data.shapes import lesion_mask
from diffva_ray.evaluate.records import read_records
from diffva_ray.generate.run import open_run


def diffva(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def generated(data: Path, model: Path, out: Path, *options: object) -> pd.DataFrame:
    words = ("generate", "--data", data, "--model", model, "--out", out, "--executor", "inline", *options)
    accept = ("--set", "evaluate.max_quarantined_fraction=1")  # replicas lack some files
    assert (result := diffva(*words, *accept)).exit_code == 0, result.output
    assert (result := diffva("reduce", out, "--executor", "inline")).exit_code == 0, result.output
    return read_records(open_run(str(out)))


def truth(dataset: Dataset, record: dict[str, Any]) -> np.ndarray | None:
    """The lesion that the data set knows of a record's image: a mask's file, else its outlines."""
    image = next(i for i in dataset.images if (i.path, i.label) == (record["image_path"], record["label"]))
    if image.lesion_mask:
        return read_mask(dataset.store, image.lesion_mask, 32)
    return lesion_mask(dataset.lesion_shapes(image.path, image.label), record["width"], record["height"], 32)


@pytest.mark.parametrize("expected", SETS, ids=NAMES)
def test_each_set_is_scored_against_its_own_truth(expected: Expected, model: Path, tmp_path: Path) -> None:
    expected.replica(tmp_path / "data")
    dataset = open_dataset(tmp_path / "data")
    records = generated(tmp_path / "data", model, tmp_path / "run")
    ok = records[records["status"] == "ok"]
    assert len(ok)
    # what the set knows of each image is in its record
    known = {(image.path, image.label): image for image in dataset.images}
    for record in ok.to_dict("records"):
        image = known[record["image_path"], record["label"]]
        assert record["patient"] == image.patient or not image.patient
        assert {name: record[name] for name in image.columns} == dict(image.columns)
    # every outlined lesion is scored, under its own label only
    metrics = json.loads((tmp_path / "run" / "tables" / "metrics.json").read_text())
    masks = [truth(dataset, record) for record in ok.to_dict("records")]
    outlined = [mask for mask in masks if mask is not None and mask.any()]
    scored = {row["label"]: row["n"] for row in metrics.get("localization", []) if row["map"] == "positive"}
    assert max(scored.values(), default=0) == len(outlined)
    assert bool(outlined) == bool(expected.outlined + expected.masked)
    if ok["patient"].any():
        assert any("intervals are by patient" in note for note in metrics["notes"])
    about = open_run(str(tmp_path / "run")).about
    assert about["data_kind"] == expected.kind
    assert about["data_recognised_by"]
    # the report shows the scores
    assert (result := diffva("report", tmp_path / "run")).exit_code == 0, result.output
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert (">AUROC" in page) == bool(outlined)


def test_headers_of_dicom_files_fill_what_the_set_does_not_know(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    replicas.image(tmp_path / "data", "Normal/0.dcm", "COVID/1.dcm")
    records = generated(tmp_path / "data", model, tmp_path / "run", "--classes", "Normal,COVID")
    assert set(records["patient"]) == {patient_key("P0"), patient_key("P1")}
    assert set(records["view"]) == {"PA"}
    assert set(records["age"]) == {"61"}
    assert set(records["sex"]) == {"F"}


def test_columns_of_a_manifest_and_its_words_reach_the_records(images: Path, model: Path, tmp_path: Path) -> None:
    names = sorted((images / "COVID" / "images").iterdir())[:2]
    rows = "".join(f"{name};COVID;P7;{n};ward {n}\n" for n, name in enumerate(names))
    (tmp_path / "films.csv").write_text(f"File;Finding;PatientID;seed;Station\n{rows}")
    options = ("--columns", "image=File,label=Finding,patient=PatientID", "--root", images)
    records = generated(tmp_path / "films.csv", model, tmp_path / "run", *options)
    assert records["patient"].tolist() == [patient_key("P7")] * 2
    assert sorted(records["Station"]) == ["ward 0", "ward 1"]
    assert sorted(records["data_seed"]) == ["0", "1"]  # a name that records have already
    assert diffva("verify", tmp_path / "run").exit_code == 0
    assert diffva("report", tmp_path / "run").exit_code == 0
