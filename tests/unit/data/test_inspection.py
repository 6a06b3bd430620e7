"""The report of `diffva inspect` agrees with the files."""

from __future__ import annotations

import json
from io import BytesIO

import numpy as np
import pytest
from click.testing import CliRunner
from dicom_files import dicom
from PIL import Image, ImageDraw, ImageFont

from diffva_ray.cli import main
from diffva_ray.data.columns import patient_key
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.dicom import header_columns, opened
from diffva_ray.data.encoding import quantise
from diffva_ray.data.images import decode_with_columns
from diffva_ray.data.inspection import inspect
from diffva_ray.data.near_duplicates import NEAR, near_duplicates
from diffva_ray.data.phantoms import phantom


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
    assert json.loads(json.dumps(summary))["near_duplicates"]["method"] == summary["near_duplicates"]["method"]
    assert summary["kind"] == "radiography"
    assert summary["classes"] == {"COVID": 2, "Normal": 3}
    assert (summary["images"], summary["files"], summary["examined"]) == (5, 5, 5)
    kinds = ("lung_mask", "lesion_mask", "ground_truth", "outlined_lesion")
    assert [summary[f"with_{kind}"] for kind in kinds] == [1, 1, 1, 1]
    assert summary["sizes"] == {"40x40": 2, "80x80": 1, "50x40": 1}
    assert summary["modes"] == {"PNG grey 8-bit": 2, "JPEG grey 8-bit": 1, "PNG grey 16-bit": 1}
    assert summary["unreadable"] == [
        {"path": "Normal/images/broken.png", "status": "bad_image", "reason": "the file is empty (0 bytes)"}
    ]
    ((one, two, bits),) = summary["near_duplicates"]["pairs"]
    assert (one, two) == ("COVID/images/a-larger.jpg", "COVID/images/a.png")
    assert bits <= NEAR
    assert f"at most {NEAR} of 256 bits" in summary["near_duplicates"]["method"]


def test_a_file_of_two_labels_is_examined_once_and_absent_ones_are_missing(folder):
    rows = "path,label\nCOVID/images/a.png,A\nCOVID/images/a.png,B\nnone.png,A\n"
    (folder / "list.csv").write_text(rows)
    summary = inspect(open_dataset(folder / "list.csv"))
    assert (summary["images"], summary["files"]) == (3, 2)
    assert summary["unreadable"] == [{"path": "none.png", "status": "missing", "reason": "no such file"}]
    assert summary["near_duplicates"]["pairs"] == []


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
    expected = [pair for n in range(50) for pair in ((f"{n}-copy", f"{n}-near", NEAR), (f"{n}-copy", f"{n}-same", 0))]
    assert near_duplicates(hashes) == sorted(expected)
    assert near_duplicates({}) == []


SIDE = 160


@pytest.fixture
def chests(tmp_path):
    """Fourteen phantoms, of which nothing is suspect."""
    for number in range(14):
        save(tmp_path, f"COVID/{number:02d}.png", chest(number))
    return tmp_path


def chest(number: int) -> Image.Image:
    return Image.fromarray(quantise(phantom("COVID", number, 5, SIDE).image))


def text(image: Image.Image) -> Image.Image:
    large = image.resize((480, 480))
    ImageDraw.Draw(large).text((6, 6), "DOE JANE 1957", fill=255, font=ImageFont.load_default(20))
    return large


def padded(image: Image.Image) -> Image.Image:
    wide = Image.new("L", (SIDE * 3 // 2, SIDE))
    wide.paste(image, (0, 0))
    return wide


def tinted(image: Image.Image) -> Image.Image:
    colours = np.stack([np.asarray(image)] * 3, 2)
    colours[:40, :40] = 255, 0, 0
    return Image.fromarray(colours)


SUSPECT = {
    "inverted": (lambda image: Image.fromarray(255 - np.asarray(image)), "inverted? bone looks black"),
    "turned": (lambda image: image.rotate(90), "rotated? looks upright when turned by 270 degrees anticlockwise"),
    "upside_down": (lambda image: image.rotate(180), "rotated? looks upright when turned by 180 degrees"),
    "text": (text, "text? "),
    "padded": (padded, "padded? 33% of a side"),
    "strip": (lambda image: image.crop((0, 0, SIDE // 2, SIDE)), "cropped or stretched? width / height is 0.50"),
    "half": (lambda image: image.crop((0, 0, SIDE // 2, SIDE)).resize((SIDE, SIDE)), "cropped? looks like a part of"),
    "tinted": (tinted, "coloured: "),
}


def test_ordinary_images_are_no_suspects(chests):
    assert inspect(open_dataset(chests))["suspects"] == []


@pytest.mark.parametrize("name", SUSPECT)
def test_suspects_are_listed_with_the_reason(chests, name):
    change, reason = SUSPECT[name]
    save(chests, f"COVID/x_{name}.png", change(chest(50)))
    (suspect,) = inspect(open_dataset(chests))["suspects"]
    assert suspect["path"] == f"COVID/x_{name}.png"
    assert any(found.startswith(reason) for found in suspect["reasons"]), suspect
    output = CliRunner().invoke(main, ["inspect", str(chests)]).output
    assert f"suspect: 'COVID/x_{name}.png': " in output


def test_an_inverted_set_is_found_as_such(tmp_path):
    for number in range(14):
        save(tmp_path, f"COVID/{number:02d}.png", Image.fromarray(255 - np.asarray(chest(number))))
    found = inspect(open_dataset(tmp_path))["suspects"]
    assert len(found) == 14
    assert all(row["reasons"][0].startswith("inverted?") for row in found)


def test_headers_give_patients_views_and_nothing_else(tmp_path):
    for number, view in enumerate(("PA", "AP", "LL")):
        values = np.asarray(chest(number), np.int64) * 16
        data = dicom(values, PatientID=f"secret-{number % 2}", PatientName="Doe^Jane", ViewPosition=view,
                     PatientSex="M", PatientAge="061Y", ImageLaterality="U", ImagerPixelSpacing=[0.2, 0.1])  # fmt: skip
        (tmp_path / "COVID").mkdir(exist_ok=True)
        (tmp_path / "COVID" / f"IM00000{number}").write_bytes(data)
    summary = inspect(open_dataset(tmp_path))
    assert (summary["files"], summary["patients"]) == (3, 2)
    assert summary["columns"]["view"] == {"PA": 1, "AP": 1, "LATERAL": 1}
    assert summary["columns"]["sex"] == {"M": 3}
    assert [row["reasons"] for row in summary["suspects"] if row["path"].endswith("2")] == [
        ["not frontal: its view is LATERAL"]
    ]
    assert "secret" not in json.dumps(summary)
    assert "Doe" not in json.dumps(summary)
    assert decode_with_columns(data)[2] == {
        "patient": patient_key("secret-0"), "view": "LATERAL", "laterality": "U", "age": "61", "sex": "M",
        "spacing": "0.2/0.1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("side", "spacing", "kept"), [(1024, 0.143, ""), (1024, 0.35, "0.35/0.35"), (64, 0.2, "0.2/0.2")]
)
def test_a_spacing_from_before_resizing_is_left_out(side: int, spacing: float, kept: str) -> None:
    """RSNA's files: 1024 px of NIH's radiographs with 0.143 mm, a chest of 15 cm."""
    data = dicom(np.zeros((side, side), np.int64) + np.arange(side), PixelSpacing=[spacing, spacing])
    assert header_columns(opened(data)).get("spacing", "") == kept


def test_two_data_sets_are_compared(tmp_path):
    for name, numbers in (("train", (0, 1, 2)), ("test", (2, 3, 4))):
        rows = "".join(f"{n}.png,COVID,patient {n % 4}\n" for n in numbers)
        (tmp_path / name).mkdir()
        (tmp_path / name / "list.csv").write_text(f"path,label,patient\n{rows}")
        for n in numbers:
            save(tmp_path, f"{name}/{n}.png", chest(n))
    save(tmp_path, "test/4.png", chest(1), compress_level=1)  # other bytes, the same pixels
    words = ["inspect", str(tmp_path / "train" / "list.csv"), str(tmp_path / "test" / "list.csv")]
    common = json.loads(CliRunner().invoke(main, [*words, "--json"]).output)["overlap"]
    assert common["patients"] == sorted({patient_key("patient 0"), patient_key("patient 2")})
    assert common["equal_files"] == [["2.png", "2.png"]]
    assert common["near_duplicates"]["pairs"] == [["1.png", "4.png", 0]]
    output = CliRunner().invoke(main, words).output
    assert "patients in both: 2 (of 3 and 3)" in output
    assert "split them by patient" in output
    alone = CliRunner().invoke(main, [*words[:2], str(tmp_path / "test" / "list.csv")]).output
    assert "near-duplicates: '1.png', '4.png' (0 bits apart)" in alone
