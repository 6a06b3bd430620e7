"""COCO annotations: the regions of each attribution map above a threshold, and the known lesion beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import find_objects, label

from diffva_ray.data.shapes import coco_text, runs_of
from diffva_ray.evaluate.tables import clean
from diffva_ray.export.contents import Contents
from diffva_ray.export.examples import Example
from diffva_ray.export.regions import above, signed_map

CATEGORIES = ["attribution", "lesion"]  # ids from 1


class CocoFile:
    """A JSON file of annotations, with the images beside it in ``images/<name of the file>/``."""

    def __init__(self, contents: Contents, path: str) -> None:
        assert contents.threshold is not None
        self.contents, self.threshold = contents, contents.threshold
        self.folder = f"images/{PurePosixPath(path).stem}"
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add(self, examples: Sequence[Example]) -> None:
        for example in examples:
            number = len(self.images) + 1
            self.images.append({"id": number, **self._image(example)})
            for annotation in self._annotations(example):
                self.annotations.append({"id": len(self.annotations) + 1, "image_id": number, **annotation})

    def close(self) -> bytes:
        content = {
            "info": {
                "description": "diffva-ray attribution maps; synthetic counterfactuals; not for clinical use",
                "run": self.contents.run.fingerprint,
                "threshold": self.threshold,
            },
            "images": self.images,
            "categories": [{"id": n, "name": name} for n, name in enumerate(CATEGORIES, start=1)],
            "annotations": self.annotations,
        }
        return json.dumps(content).encode()

    def _image(self, example: Example) -> dict[str, Any]:
        """Write the images and return the entry: without a copy of the image, the path in its data set."""
        record, size = example.record, self.contents.size
        names = {"file_name": example.image, "counterfactual_file_name": example.counterfactual}
        entry: dict[str, Any] = {"width": size, "height": size}
        for key, data in names.items():
            suffix = "" if key == "file_name" else ".counterfactual"
            if data is not None:
                entry[key] = f"{record['record_id']}{suffix}.png"
                self.contents.store.put(f"{self.folder}/{entry[key]}", data)
        entry.setdefault("file_name", record["image_path"])
        return entry | {"record": clean(self.contents.row(record))}

    def _annotations(self, example: Example) -> Iterator[dict[str, Any]]:
        signed = signed_map(self.contents.run, example)
        for region in _regions(above(self.contents.run, example, self.threshold)):
            yield {"category_id": 1, **_outline(region), "score": round(float(signed[region].max()), 6)}
        for region in _regions(example.truth.lesion) if example.truth.lesion is not None else ():
            yield {"category_id": 2, **_outline(region)}


def _regions(mask: NDArray[np.bool_]) -> Iterator[NDArray[np.bool_]]:
    """The connected regions of a mask (also over corners), each as a mask."""
    labels, count = label(mask, np.ones((3, 3)))
    for number in range(1, count + 1):
        yield labels == number


def _outline(region: NDArray[np.bool_]) -> dict[str, Any]:
    rows, columns = find_objects(region.astype(np.int32))[0]
    height, width = region.shape
    return {
        "segmentation": {"size": [height, width], "counts": coco_text(runs_of(region))},
        "bbox": [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start],
        "area": int(region.sum()),
        "iscrowd": 0,
    }
