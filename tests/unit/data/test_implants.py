"""Lesions in other images: exact ground-truth counterfactuals, lesions inside the lungs, the same for the same seed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import ndimage

from diffva_ray.cli import main
from diffva_ray.data.dataset import UnusableData
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.encoding import encode_grey, quantise
from diffva_ray.data.images import decode, decode_mask, to_square
from diffva_ray.data.implants import DRAWN, Host, Lungs, NoLungs, Source, implant, implant_set
from diffva_ray.data.lungs import find_lungs
from diffva_ray.data.phantoms import phantom
from diffva_ray.storage.local import LocalStore

SIZE = 64


def write(folder: Path, path: str, data: bytes) -> None:
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(data)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five healthy images of 90 x 100 px in place of real ones, the last without a mask; and one of another class."""
    folder = tmp_path_factory.mktemp("healthy")
    for n in range(5):
        made = phantom("Normal", 50 + n, size=100)
        write(folder, f"Normal/images/image{n}.png", encode_grey(quantise(made.image[5:95])))
        if n < 4:
            write(folder, f"Normal/masks/image{n}.png", encode_grey(made.lungs[5:95].astype(np.uint8) * 255))
    write(folder, "COVID/images/sick.png", encode_grey(quantise(phantom("COVID", 60, size=100).image)))
    return folder


@pytest.fixture(scope="module")
def made(healthy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "set"
    list(implant_set(LocalStore(str(out)), open_dataset(healthy), "Normal", 12, SIZE, Source(3)))
    return out


def listed(folder: Path) -> list[dict]:
    return json.loads((folder / "implants.json").read_text())["images"]


def test_the_layout_is_a_phantom_sets(made: Path) -> None:
    dataset = open_dataset(made)
    assert dataset.classes == {"COVID": 3, "Lung_Opacity": 3, "Normal": 3, "Viral Pneumonia": 3}
    assert dataset.kind == "radiography"  # a model trained on phantoms does not know these images
    for image in dataset.images:
        assert image.lung_mask
        assert bool(image.lesion_mask) == bool(image.ground_truth) == (image.label != "Normal")


def test_the_ground_truth_counterfactual_is_the_original_bit_by_bit(made: Path, healthy: Path) -> None:
    for image in listed(made):
        original = quantise(to_square(decode((healthy / image["source"]).read_bytes()), SIZE))
        path = image["file"] if image["label"] == "Normal" else image["file"].replace("/images/", "/ground_truth/")
        assert (made / path).read_bytes() == encode_grey(original)


def test_the_image_differs_from_its_ground_truth_only_by_the_lesion(made: Path) -> None:
    for image in listed(made):
        if image["label"] == "Normal":
            continue
        pixels, ground_truth = (decode((made / image["file"].replace("images", kind)).read_bytes())
                         for kind in ("images", "ground_truth"))  # fmt: skip
        lesion, lungs = (decode_mask((made / image["file"].replace("images", kind)).read_bytes(), SIZE)
                         for kind in ("lesions", "masks"))  # fmt: skip
        assert lesion.mean() >= 0.004
        assert not (lesion & ~lungs).any()
        difference = np.abs(pixels - ground_truth)
        assert not difference[~lungs].any()
        assert difference[lesion].mean() > 0.04
        assert difference.max() < 0.5
        far = ~ndimage.binary_dilation(lesion, iterations=SIZE // 8)
        limit = 0.1 if image["label"] == "Viral Pneumonia" else 0.05  # the former has a mesh of threads
        assert difference[far].max() < limit
        assert difference[far].mean() < 0.005


def test_every_image_is_used_once_before_one_is_used_twice(made: Path) -> None:
    sources = [image["source"] for image in listed(made)]
    assert len(set(sources[:5])) == 5
    assert sources[5:10] == sources[:5]
    assert {image["lungs"] for image in listed(made)} == {"mask", "searched"}


def test_the_same_seed_makes_the_same_set(made: Path, healthy: Path, tmp_path: Path) -> None:
    for seed, same in ((3, True), (4, False)):
        out = tmp_path / str(seed)
        paths = list(implant_set(LocalStore(str(out)), open_dataset(healthy), "Normal", 12, SIZE, Source(seed)))
        sick = [path for path in paths if not path.startswith("Normal")]
        assert all((out / path).read_bytes() == (made / path).read_bytes() for path in sick) is same


@pytest.mark.parametrize("label", DRAWN)
def test_lesions_are_brighter_and_a_pneumothorax_is_darker(label: str) -> None:
    for number in range(4):
        patient = phantom("Normal", number, size=96)
        ground_truth = quantise(patient.image)
        result = implant(Host(None, ground_truth, patient.lungs, False), label, 0, number)  # type: ignore[arg-type]
        change = (result.image.astype(float) - ground_truth)[result.lesion].mean()
        assert change < -10 if label == "Pneumothorax" else change > 10


def test_lungs_are_found_by_their_darkness() -> None:
    for number in range(8):
        patient = phantom("Normal", number, size=96)
        lungs = find_lungs(patient.image)
        assert lungs is not None
        assert (lungs & patient.lungs).sum() / (lungs | patient.lungs).sum() > 0.6
    noise = np.random.default_rng(0).uniform(size=(96, 96)).astype(np.float32)
    for without_lungs in (np.zeros((96, 96), np.float32), noise):
        assert find_lungs(without_lungs) is None


def test_a_mask_of_one_lung_is_refused() -> None:
    lungs = phantom("Normal", 0).lungs
    assert Lungs(lungs).lung(np.array(-0.45), np.array(-0.1), -1) > 0
    with pytest.raises(NoLungs, match="two lungs"):
        Lungs(np.zeros_like(lungs))


def test_lungs_that_touch_are_separated_at_the_middle() -> None:
    mask = np.zeros((64, 64), bool)
    mask[10:50, 8:56] = True
    lungs = Lungs(mask)
    assert lungs.lung(np.array([-0.4, 0.4]), np.array([0.0, 0.0]), -1).tolist()[0] > 0
    assert lungs.lung(np.array([-0.4, 0.4]), np.array([0.0, 0.0]), 1).tolist()[0] < 0


def test_unusable_images_are_skipped(healthy: Path, tmp_path: Path, caplog) -> None:
    shutil.copytree(healthy, tmp_path / "images")
    (tmp_path / "images" / "Normal" / "images" / "image1.png").write_bytes(b"torn")
    flat = encode_grey(np.full((64, 64), 128, np.uint8))
    write(tmp_path, "images/Normal/images/image9.png", flat)  # without a mask and without lungs
    list(implant_set(LocalStore(str(tmp_path / "out")), open_dataset(tmp_path / "images"), "Normal", 8, SIZE))
    sources = [image["source"][-5] for image in listed(tmp_path / "out")]
    assert sources == list("02340234")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "data.healthy_class=Sound"), "no image of the healthy class 'Sound'"),
        (("--classes", "Cardiomegaly"), "Cardiomegaly"),
        (("--onto", "{tmp}/nowhere"), "nowhere"),
        (("--onto", "{tmp}/blank"), "none of its 1 healthy images can be used"),
        (("--out", "{onto}/new"), "choose another folder"),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, str], message: str, healthy: Path, tmp_path: Path) -> None:
    write(tmp_path, "blank/Normal/images/a.png", encode_grey(np.zeros((64, 64), np.uint8)))
    option, value = (text.replace("{tmp}", str(tmp_path)).replace("{onto}", str(healthy)) for text in arguments)
    out = value if option == "--out" else str(tmp_path / "out")
    more = () if option == "--out" else (option, value)
    result = CliRunner().invoke(main, ["phantoms", out, "--onto", str(healthy), "--patients", "3", *more])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("diffva ")]) == 1
    assert not Path(out).exists()


def test_the_command_writes_images_of_the_recipes_size(healthy: Path, tmp_path: Path) -> None:
    command = ["phantoms", str(tmp_path / "out"), "--onto", str(healthy), "--patients", "4"]
    assert json.loads(CliRunner().invoke(main, [*command, "--dry-run"]).output)["healthy_images"] == 5
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(main, command)
    assert "4 images of 64 px" in result.output
    with pytest.raises(UnusableData, match="no class 'Hernia'"):
        next(
            iter(
                implant_set(
                    LocalStore(str(tmp_path / "x")), open_dataset(healthy), "Normal", 1, 64, Source(), ["Hernia"]
                )
            )
        )
