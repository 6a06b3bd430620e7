"""DICOM exports, read with pydicom and highdicom, and checked by dciodvfy where it is installed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import Result
from dicom_files import STUDY
from export_files import expected, tree

from diffva_ray.evaluate.direction import direction
from diffva_ray.export import exporting
from diffva_ray.generate.run import open_run

pydicom = pytest.importorskip("pydicom")
highdicom = pytest.importorskip("highdicom")

Export = Callable[..., Result]
PATIENT = ("PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate")
KINDS = ("image", "counterfactual", "attribution", "segmentation")


def exported(out: Path) -> pd.DataFrame:
    """The records of an export."""
    return pd.concat([pd.read_parquet(path) for path in sorted((out / "records").glob("*.parquet"))])


def opened(out: Path, row: Any) -> dict[str, Any]:
    """The objects of a record by kind."""
    return {kind: pydicom.dcmread(out / row[f"{kind}_dicom"]) for kind in KINDS}


def test_pixels_map_and_regions_come_back(finished: Path, export: Export, tmp_path: Path) -> None:
    result, out = export(finished, "dicom", "--threshold", 0.02), tmp_path / "out"
    assert result.exit_code == 0, result.output
    wanted, run = expected(finished), open_run(str(finished))
    rows = exported(out)
    assert set(rows["record_id"]) == set(wanted)
    for row in rows.to_dict("records"):
        record, found = wanted[row["record_id"]], opened(out, row)
        np.testing.assert_array_equal(found["image"].pixel_array, record["image"])
        np.testing.assert_array_equal(found["counterfactual"].pixel_array, record["counterfactual"])
        np.testing.assert_allclose(found["attribution"].pixel_array, record["attribution"], atol=1e-4)
        above = (direction(run, record) * record["attribution"] > 0.02) & (record["lung_mask"] > 0)
        regions = highdicom.seg.segread(out / row["segmentation_dicom"])
        frames = regions.pixel_array.reshape(-1, 32, 32)
        np.testing.assert_array_equal(frames, np.stack([above, record["lesion_mask"] > 0]))
        assert "0.02" in regions.SegmentSequence[0].SegmentLabel


def test_objects_say_that_they_are_synthetic_and_of_one_study(dicom_run: Path, export: Export, tmp_path: Path) -> None:
    result, out = export(dicom_run, "dicom", "--threshold", 0.02), tmp_path / "out"
    assert result.exit_code == 0, result.output
    seen = set()
    for row in exported(out).to_dict("records"):
        found = opened(out, row)
        assert found["counterfactual"].ImageType[2] == "SYNTHETIC"
        assert "SYNTHETIC" in found["counterfactual"].SeriesDescription
        assert [found[kind].SyntheticData for kind in KINDS] == ["NO", "YES", "YES", "YES"]
        for instance in found.values():
            seen.add(instance.SOPInstanceUID)
            assert instance.StudyInstanceUID == found["image"].StudyInstanceUID
            assert instance.get("PatientIdentityRemoved", "YES") == "YES"
            assert not any(str(instance.get(name) or "") for name in PATIENT)
            text = str(instance)
            assert not any(str(STUDY[name]) in text for name in (*PATIENT, "PatientID") if len(str(STUDY[name])) > 3)
        for kind in ("attribution", "segmentation"):
            sources = {item.ReferencedSOPInstanceUID for item in found[kind].SourceImageSequence}
            assert {found["image"].SOPInstanceUID, found["counterfactual"].SOPInstanceUID} <= sources
    assert len(seen) == 4 * 3  # every object has a UID of its own


def test_the_source_file_is_referred_to_and_its_geometry_kept(dicom_run: Path, export: Export, tmp_path: Path) -> None:
    assert export(dicom_run, "dicom", "--threshold", 0.02).exit_code == 0
    for row in exported(tmp_path / "out").to_dict("records"):
        found = opened(tmp_path / "out", row)
        measures = [
            found[kind].SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing
            for kind in ("attribution", "segmentation")
        ]
        if row["image_path"].endswith(".png"):
            assert found["image"].StudyInstanceUID.startswith("2.25.")
            assert found["image"].PixelAspectRatio == [96, 64]
            assert measures == [[3, 2], [3, 2]]  # pixels of the source image
            assert "unknown" in found["attribution"].ImageComments
            continue
        source = pydicom.dcmread(dicom_run.parent / "data" / row["image_path"])
        for kind, instance in found.items():
            assert instance.StudyInstanceUID == STUDY["StudyInstanceUID"]
            assert instance.PatientID == row["patient"]
            assert source.SOPInstanceUID in {item.ReferencedSOPInstanceUID for item in instance.SourceImageSequence}
            series = {item.SeriesInstanceUID for item in instance.ReferencedSeriesSequence}
            assert STUDY["SeriesInstanceUID"] in series
            if kind in ("attribution", "segmentation"):
                assert instance.FrameOfReferenceUID == STUDY["FrameOfReferenceUID"]
            else:
                assert (instance.ImageLaterality, instance.PatientOrientation) == ("R", ["L", "F"])
                np.testing.assert_allclose(instance.PixelSpacing, [0.6, 0.4])  # 96 rows and 64 columns became 32
        np.testing.assert_allclose(measures, [[0.6, 0.4]] * 2)


def test_patient_data_and_a_banner_only_on_request(dicom_run: Path, export: Export, tmp_path: Path) -> None:
    assert export(dicom_run, "dicom", "--threshold", 0.02, out=tmp_path / "plain").exit_code == 0
    result = export(dicom_run, "dicom", "--threshold", 0.02, "--with-patients", "--banner")
    assert result.exit_code == 0, result.output
    plain = exported(tmp_path / "plain").set_index("record_id")
    for row in exported(tmp_path / "out").to_dict("records"):
        found, before = opened(tmp_path / "out", row), opened(tmp_path / "plain", plain.loc[row["record_id"]])
        if row["image_path"].endswith(".dcm"):
            for instance in found.values():
                assert all(str(instance.get(name)) == STUDY[name] for name in (*PATIENT, "PatientID"))
        marked, original = found["counterfactual"].pixel_array, before["counterfactual"].pixel_array
        assert found["counterfactual"].BurnedInAnnotation == "YES"
        assert (marked[:8] != original[:8]).any()
        np.testing.assert_array_equal(marked[10:], original[10:])
        assert found["counterfactual"].SOPInstanceUID != before["counterfactual"].SOPInstanceUID


def test_the_same_run_gives_the_same_bytes(dicom_run: Path, export: Export, tmp_path: Path) -> None:
    for name in ("first", "second"):
        assert export(dicom_run, "dicom", "--threshold", 0.02, out=tmp_path / name).exit_code == 0
    assert tree(tmp_path / "first") == tree(tmp_path / "second")


@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="dciodvfy (Debian package dicom3tools) is not installed")
def test_dciodvfy_finds_no_error(finished: Path, dicom_run: Path, export: Export, tmp_path: Path) -> None:
    export(dicom_run, "dicom", "--threshold", 0.02, "--with-patients", out=tmp_path / "dicom")
    export(dicom_run, "dicom", "--threshold", 0.02, "--without-images", out=tmp_path / "less")
    export(finished, "dicom", "--threshold", 0.02, out=tmp_path / "plain")
    files = sorted(tmp_path.rglob("*.dcm"))
    assert len(files) == 4 * 3 + 3 * 3 + 4 * 17
    for path in files:
        checked = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, text=True, errors="replace")
        errors = [line for line in (checked.stdout + checked.stderr).splitlines() if line.startswith("Error")]
        # Synthetic Data is in the standard since 2023, and younger than dciodvfy's tables
        assert [line for line in errors if "(0008,001c)" not in line] == [], path


def test_options_of_other_formats_and_a_missing_threshold_are_named(
    dicom_run: Path,
    export: Export,
) -> None:
    result = export(dicom_run, "huggingface", "--banner")
    assert (result.exit_code, "--banner" in result.stderr) == (2, True)
    result = export(dicom_run, "dicom")  # no lesion is known, so the run has no threshold
    assert (result.exit_code, "--threshold" in result.stderr) == (2, True)


def test_a_missing_package_is_named(
    dicom_run: Path, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "version", lambda package: "absent" if package == "highdicom" else "1")
    result = export(dicom_run, "dicom", "--threshold", 0.02)
    assert (result.exit_code, "diffva-ray[dicom]" in result.stderr) == (2, True)
    assert not (tmp_path / "out").exists()
