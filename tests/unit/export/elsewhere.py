"""Loads exports in an environment without diffva-ray and compares them with the files of the run.

    python elsewhere.py RUN EXPORTS

EXPORTS has a folder for each format, named like it. Needs datasets, webdataset, pycocotools, highdicom, duckdb,
pandas and mlcroissant.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import sys
from pathlib import Path

import datasets
import duckdb
import highdicom
import mlcroissant
import numpy as np
import pandas as pd
import pydicom
import webdataset
from PIL import Image
from pycocotools.coco import COCO

assert importlib.util.find_spec("diffva_ray") is None
RUN, EXPORTS = map(Path, sys.argv[1:])
KINDS = ("counterfactual", "reconstruction")


def grey(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def expected() -> dict[str, dict[str, np.ndarray]]:
    """The pixels and the map of each record, from the files of the run."""
    records = pd.read_parquet(RUN / "records")
    found = {}
    for row in records[records["status"] == "ok"].to_dict("records"):
        images = {kind: grey(RUN / row[f"{kind}_path"]) for kind in KINDS}
        images["attribution"] = (grey(RUN / row["attribution_path"]).astype(np.float64) - 32768) / 32767
        found[row["record_id"]] = images
    return found


def same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    for kind, pixels in found.items():
        if kind == "attribution":
            assert np.abs(np.asarray(pixels, np.float64) - wanted[kind]).max() <= 1e-4
        else:
            assert np.array_equal(pixels, wanted[kind]), kind


def huggingface(folder: Path, wanted: dict[str, dict[str, np.ndarray]]) -> int:
    seen = set()
    for streaming in (False, True):
        loaded = datasets.load_dataset(str(folder), streaming=streaming, cache_dir=str(EXPORTS / "cache"))
        for split in loaded.values():
            for row in split:
                same({kind: np.asarray(row[kind]) for kind in (*KINDS, "attribution")}, wanted[row["record_id"]])
                seen.add(row["record_id"])
    (counted,) = duckdb.sql(f"select count(*), count(distinct record_id) from '{folder}/data/*.parquet'").fetchall()
    assert counted == (len(seen), len(seen))
    return len(seen)


def tar(folder: Path, wanted: dict[str, dict[str, np.ndarray]]) -> int:
    shards = sorted(glob.glob(f"{folder}/shards/*.tar"))
    rows = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
    for row in rows:
        found = {kind: np.asarray(row[f"{kind}.png"].convert("L")) for kind in KINDS}
        same({**found, "attribution": row["attribution.npy"]}, wanted[row["__key__"].rpartition("/")[2]])
    return len(rows)


def dicom(folder: Path, wanted: dict[str, dict[str, np.ndarray]]) -> int:
    count = 0
    for path in sorted(folder.glob("records/*.parquet")):
        for row in pd.read_parquet(path).to_dict("records"):
            healthy = pydicom.dcmread(folder / row["counterfactual_dicom"])
            signed = pydicom.dcmread(folder / row["attribution_dicom"])
            regions = highdicom.seg.segread(folder / row["segmentation_dicom"])
            assert regions.segmented_property_types
            assert healthy.ImageType[2] == "SYNTHETIC"
            found = {"counterfactual": healthy.pixel_array, "attribution": signed.pixel_array}
            same(found, wanted[row["record_id"]])
            count += 1
    return count


def coco(folder: Path, wanted: dict[str, dict[str, np.ndarray]]) -> int:
    count = 0
    for path in sorted(folder.glob("annotations/*.json")):
        loaded = COCO(str(path))
        threshold = json.loads(path.read_text())["info"]["threshold"]
        for image in loaded.imgs.values():
            record = wanted[image["record"]["record_id"]]
            same({"counterfactual": grey(folder / "images" / path.stem / image["counterfactual_file_name"])}, record)
            for annotation in loaded.imgToAnns[image["id"]]:
                mask = loaded.annToMask(annotation).astype(bool)
                assert mask.sum() == annotation["area"]
                assert annotation["category_id"] != 1 or (record["attribution"][mask] > threshold).all()
            count += 1
    return count


def main() -> None:
    wanted = expected()
    for name, load in {"huggingface": huggingface, "webdataset": tar, "dicom": dicom, "coco": coco}.items():
        assert load(EXPORTS / name, wanted) == len(wanted), name
        mlcroissant.Dataset(jsonld=str(EXPORTS / name / "croissant.json"))  # raises for metadata that is not valid
        print(f"{name}: {len(wanted)} records equal")
    records = datasets.load_dataset(str(RUN), split="train", cache_dir=str(EXPORTS / "cache"))
    assert set(wanted) <= set(records["record_id"])
    print(f"run: {len(records)} records")


main()
