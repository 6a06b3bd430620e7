"""The report of `diffva inspect` agrees with the files."""

from __future__ import annotations

import json
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.inspection import NEAR, inspect, near_duplicates


def image(seed: int, width: int = 40, height: int = 40) -> Image.Image:
    """A smooth random image; the same for a seed at any size."""
    grid = np.random.default_rng(seed).uniform(0, 255, (8, 8)).astype(np.float32)
    return Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC).convert("L")


def save(root, path: str, image: Image.Image, format: str = "PNG", **options) -> None:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(buffer.getvalue())


@pytest.fixture
def folder(tmp_path):
    save(tmp_path, "COVID/images/a.png", image(1))
    save(tmp_path, "COVID/images/a-larger.jpg", image(1, 80, 80), "JPEG", quality=90)
    save(tmp_path, "COVID/masks/a.png", image(1))
    save(tmp_path, "COVID/lesions/a.png", image(1))
    save(tmp_path, "COVID/ground_truth/a.png", image(1))
    save(tmp_path, "Normal/images/b.png", image(2, 50, 40))
    save(tmp_path, "Normal/images/c.png", Image.fromarray(np.asarray(image(3)).astype(np.uint16) * 256))
    (tmp_path / "Normal/images/broken.png").write_bytes(b"")
    (tmp_path / "boxes.csv").write_text("file,x,y,w,h\na.png,1,2,3,4\n")
    return tmp_path


def test_summary_is_plain_and_complete(folder):
    summary = inspect(open_dataset(folder))
    assert json.loads(json.dumps(summary)) == summary
    assert summary["kind"] == "radiography"
    assert summary["classes"] == {"COVID": 2, "Normal": 3}
    assert (summary["images"], summary["files"], summary["examined"]) == (5, 5, 5)
    counts = [summary[key] for key in ("with_lung_mask", "with_lesion_mask", "with_ground_truth", "with_boxes")]
    assert counts == [1, 1, 1, 1]
    assert summary["sizes"] == {"40x40": 2, "80x80": 1, "50x40": 1}
    assert summary["modes"] == {"PNG grey 8-bit": 2, "JPEG grey 8-bit": 1, "PNG grey 16-bit": 1}
    assert summary["unreadable"] == [
        {"path": "Normal/images/broken.png", "status": "bad_image", "reason": "the file is empty (0 bytes)"}
    ]
    assert summary["near_duplicates"]["groups"] == [["COVID/images/a-larger.jpg", "COVID/images/a.png"]]
    assert f"at most {NEAR} of 256 bits" in summary["near_duplicates"]["method"]


def test_a_file_of_two_labels_is_examined_once_and_absent_ones_are_missing(folder):
    rows = "path,label\nCOVID/images/a.png,A\nCOVID/images/a.png,B\nnone.png,A\n"
    (folder / "list.csv").write_text(rows)
    summary = inspect(open_dataset(folder / "list.csv"))
    assert (summary["images"], summary["files"]) == (3, 2)
    assert summary["unreadable"] == [{"path": "none.png", "status": "missing", "reason": "no such file"}]
    assert summary["near_duplicates"]["groups"] == []


def test_deleted_and_unreadable_files_are_rows(folder, monkeypatch):
    dataset = open_dataset(folder, classes=["COVID"])
    (folder / "COVID/images/a.png").unlink()
    assert inspect(dataset)["unreadable"] == [
        {"path": "COVID/images/a.png", "status": "missing", "reason": "no such file"}
    ]

    def refuse(path):
        raise PermissionError("Access\nDenied")

    monkeypatch.setattr(dataset.store, "read", refuse)
    refused = inspect(dataset)["unreadable"]
    assert [(row["status"], row["reason"]) for row in refused] == [("error", "Access Denied")] * 2


def test_near_duplicates_are_all_pairs_within_the_distance():
    rng = np.random.default_rng(0)

    def flipped(value: int, bits: int) -> int:
        return value ^ sum(1 << int(bit) for bit in rng.choice(256, bits, replace=False))

    hashes = {}
    for number in range(50):
        base = int.from_bytes(rng.bytes(32), "big")
        hashes |= {f"{number}-same": base, f"{number}-copy": base, f"{number}-near": flipped(base, NEAR)}
        hashes[f"{number}-far"] = flipped(base, 3 * NEAR)
    groups = near_duplicates(hashes)
    assert groups == sorted([f"{n}-copy", f"{n}-near", f"{n}-same"] for n in range(50))
    assert near_duplicates({}) == []
