"""Reads MIMIC-CXR-JPG (Johnson et al. 2019): metadata, CheXpert labels and split, the reports of MIMIC-CXR where they
are unpacked among the images, and the boxes of MS-CXR.

Header lines: https://physionet.org/content/mimic-cxr-jpg/2.0.0/ and https://physionet.org/content/ms-cxr/
"""

from __future__ import annotations

from diffva_ray.data.columns import is_lateral
from diffva_ray.data.dataset import Dataset, UnusableData
from diffva_ray.data.listing import Collection, Listing, base
from diffva_ray.data.readers.chexpert import Observations
from diffva_ray.data.shapes import Box

KIND = "mimic-cxr-jpg"
LAYOUT = "MIMIC-CXR-JPG"
FILES = r"(^|/)p1\d/p\d{8}/s\d{8}/[^/]+\.(jpg|png|dcm)$"
KEEP = ("dicom_id", "subject_id", "study_id", "ViewPosition")
MS_CXR = ("dicom_id", "category_name", "x", "y", "w", "h", "image_width", "image_height")


def read(listing: Listing) -> Dataset | None:
    """The frontal images under each positive observation of their study, with patients, split and MS-CXR's boxes.

    A finding that MS-CXR outlines is a label of its image, whatever the study's labels say.
    """
    metadata = listing.named("mimic-cxr-2.?.?-metadata.csv.gz", "mimic-cxr-2.?.?-metadata.csv")
    labels = listing.named("mimic-cxr-2.?.?-chexpert.csv.gz", "mimic-cxr-2.?.?-chexpert.csv")
    if not (metadata and labels):
        needed = "mimic-cxr-2.0.0-" + ("chexpert.csv.gz" if metadata else "metadata.csv.gz")
        holds = "labels" if metadata else "views and patients"
        listing.require(LAYOUT, needed, holds, FILES, found=bool(metadata or labels))
        return None
    images = Collection(listing, KIND, f"{base(metadata[0])} and {base(labels[0])}", issuer=KIND)
    observations = Observations(listing.config)
    studies = {
        row["study_id"]: observations.positive(row, where)
        for where, row in listing.table(labels[0]).require(labels[0], "study_id").rows
    }
    outlined = _boxes(images)
    split = _split(listing)
    if not split:
        images.lacks("mimic-cxr-2.0.0-split.csv.gz", "the official split is unknown")
    for _, row in listing.table(metadata[0], KEEP).require(metadata[0], *KEEP).rows:
        name, study = row["dicom_id"], row["study_id"]
        if is_lateral(row["ViewPosition"]):
            images.skip(listing.image(name), "lateral views")
            continue
        found = sorted({*studies.get(study, ()), *outlined.get(name, ())})
        path = listing.image(name)
        report = "" if path is None else f"{path.rpartition('/')[0]}.txt"  # files/p10/p10000032/s50414267.txt
        images.add(path, f"{name}.jpg", found, row["subject_id"], view=row["ViewPosition"], split=split.get(name, ""),
                   report=report if report in listing.sizes else "")  # fmt: skip
    images.remarks += observations.remarks()
    return images.dataset()


def _split(listing: Listing) -> dict[str, str]:
    paths = listing.named("mimic-cxr-2.?.?-split.csv.gz", "mimic-cxr-2.?.?-split.csv")[:1]
    return {row["dicom_id"]: row["split"] for path in paths
            for _, row in listing.table(path).require(path, "dicom_id", "split").rows}  # fmt: skip


def _boxes(images: Collection) -> dict[str, list[str]]:
    """Adds the boxes of MS-CXR; returns the labels that it outlines, by image."""
    outlined: dict[str, list[str]] = {}
    tables = images.listing.named("MS_CXR_Local_Alignment*.csv")
    if not tables:
        images.lacks("MS_CXR_Local_Alignment_v1.0.0.csv (of MS-CXR)", "no lesion is outlined")
    for path in tables:
        for where, row in images.listing.table(path, MS_CXR).require(path, *MS_CXR).rows:
            try:
                x, y, w, h, width, height = (float(row[column]) for column in MS_CXR[2:])
            except ValueError:
                raise UnusableData(f"{where}: needs numbers in {','.join(MS_CXR[2:])}") from None
            box = Box(row["category_name"], int(width), int(height), x, y, w, h)
            images.outline(images.listing.image(row["dicom_id"]), box)
            outlined.setdefault(row["dicom_id"], []).append(row["category_name"])
    return outlined
