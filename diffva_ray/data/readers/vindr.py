"""Reads VinDr-CXR (Nguyen et al. 2022): PhysioNet's files, Kaggle's VinBigData files, and their PNG copies.

Header lines: https://physionet.org/content/vindr-cxr/1.0.0/ and
https://www.kaggle.com/c/vinbigdata-chest-xray-abnormalities-detection/data; copies in PNG with ``train_meta.csv``
(``image_id,dim0,dim1``) or with the columns ``width,height`` are Kaggle data sets of users.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from diffva_ray.data.dataset import Dataset, UnusableData
from diffva_ray.data.listing import Collection, Listing, base
from diffva_ray.data.shapes import Box
from diffva_ray.data.tables import Line

KIND = "vindr-cxr"
LAYOUT = "VinDr-CXR"
FILES = r"(^|/)(train|test)/[0-9a-f]{32}\.(dicom|dcm|png|jpe?g)$"
PHYSIONET = {"train": "annotations_train.csv", "test": "annotations_test.csv"}
IMAGE_LABELS = {"annotations_train.csv": "image_labels_train.csv", "annotations_test.csv": "image_labels_test.csv"}
AS_IN_TRAINING = {"Other disease": "Other diseases"}  # which the test table calls otherwise
COLUMNS = ("image_id", "class_name", "x_min", "y_min", "x_max", "y_max")
FURTHER = ("rad_id", "width", "height")
HEALTHY = "No finding"
AGREE = 2  # of the three radiologists of a training image
RULE = f"an image has the classes that at least {AGREE} of its radiologists name, with the boxes of all of them"


def read(listing: Listing) -> Dataset | None:
    """The images of the tables; training images by RULE, test images by the consensus that the set comes with."""
    candidates = listing.named(*PHYSIONET.values(), "train.csv")
    tables = [path for path in candidates if set(COLUMNS) <= set(listing.table(path, COLUMNS).columns)]
    if not tables:
        listing.require(LAYOUT, "annotations/annotations_train.csv (Kaggle: train.csv)", "labels and boxes", FILES)
        return None
    images = Collection(listing, KIND, f"{base(tables[0])} has the columns {','.join(COLUMNS)}", remarks=[RULE])
    _say_what_is_missing(images, {base(path).lower() for path in tables})
    meta = _original_sizes(listing)
    for path in tables:
        split = "test" if "test" in base(path) else "train"
        rows: dict[str, list[Line]] = defaultdict(list)
        for line in (*listing.table(path, (*COLUMNS, *FURTHER)).rows, *_diagnoses(listing, path)):
            rows[line.cells["image_id"]].append(line)
        for name, lines in rows.items():
            found = listing.image(f"{split}/{name}", 2) or listing.image(name)
            labels = _agreed(lines)
            _add_boxes(images, found, lines, labels, meta.get(name))
            images.add(found, name, labels, split=split)
    return images.dataset()


def _say_what_is_missing(images: Collection, tables: set[str]) -> None:
    """Notes about PhysioNet's files; Kaggle's set has one table."""
    for split, table in PHYSIONET.items() if tables & {*PHYSIONET.values()} else ():
        if table not in tables and any(f"/{split}/" in f"/{entry.path}" for entry in images.listing.images):
            images.lacks(table, f"the images of {split} have no labels")
        elif table in tables and not images.listing.named(IMAGE_LABELS[table]):
            images.lacks(IMAGE_LABELS[table], f"diagnoses of the images of {split}, such as Pneumonia, are unknown")


def _diagnoses(listing: Listing, table: str) -> list[Line]:
    """The labels of whole images (a column each, by reader), as lines of the table of boxes without a box."""
    lines = []
    for path in listing.named(IMAGE_LABELS.get(base(table).lower(), "")):
        for where, row in listing.table(path).require(path, "image_id").rows:
            reader = {"image_id": row["image_id"], "rad_id": row.get("rad_id", ""), "x_min": ""}
            lines += [Line(where, {**reader, "class_name": AS_IN_TRAINING.get(label, label)})
                      for label, value in row.items() if value in ("1", "1.0")]  # fmt: skip
    return lines


def _agreed(lines: Iterable[Line]) -> list[str]:
    readers: dict[str, set[str]] = defaultdict(set)
    everyone = set()
    for _, row in lines:
        readers[row["class_name"]].add(row.get("rad_id", ""))
        everyone.add(row.get("rad_id", ""))
    needed = min(AGREE, len(everyone))
    labels = sorted(label for label, by in readers.items() if len(by) >= needed)
    return [label for label in labels if label != HEALTHY] or labels


def _add_boxes(
    images: Collection, path: str | None, lines: Iterable[Line], labels: list[str], size: tuple[int, int] | None
) -> None:
    """Boxes are in pixels of the DICOM file; for a copy of another size, the original's size must be known."""
    for where, row in lines:
        if row["class_name"] not in labels or row["class_name"] == HEALTHY or not row["x_min"]:
            continue
        try:
            left, top, right, bottom = (float(row[column]) for column in COLUMNS[2:])
            original = (int(row["width"]), int(row["height"])) if row.get("width") and row.get("height") else size
        except ValueError:
            raise UnusableData(f"{where}: needs numbers in {','.join(COLUMNS[2:])}") from None
        if original is None and path is not None and not path.lower().endswith((".dicom", ".dcm")):
            images.left_out["boxes on copies whose original size is unknown (no train_meta.csv, no width,height)"] += 1
            continue
        width, height = original or (0, 0)
        images.outline(path, Box(row["class_name"], width, height, left, top, right - left, bottom - top))


def _original_sizes(listing: Listing) -> dict[str, tuple[int, int]]:
    """Width and height of the DICOM files by image, where a copy of the set states them."""
    sizes = {}
    for path in listing.named("train_meta.csv", "test_meta.csv"):
        for where, row in listing.table(path).require(path, "image_id", "dim0", "dim1").rows:
            try:
                sizes[row["image_id"]] = int(float(row["dim1"])), int(float(row["dim0"]))
            except ValueError:
                raise UnusableData(f"{where}: dim0 and dim1 are the height and width in pixels") from None
    return sizes
