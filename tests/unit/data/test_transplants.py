"""Lesions cut out of other images, and implants under another position and exposure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from diffva_ray.cli import main
from diffva_ray.data.acquisition import Acquisition
from diffva_ray.data.dataset import UnusableData
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.encoding import encode_grey, quantise
from diffva_ray.data.images import decode, decode_mask
from diffva_ray.data.phantoms import phantom
from diffva_ray.data.transplants import Donors, membrane

SIZE = 64


@pytest.fixture(scope="module")
def boxed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six healthy images, and four with an opacity whose box is known, one of them with a bright square as lesion."""
    folder = tmp_path_factory.mktemp("boxed")
    rows = ["file,x,y,w,h,label"]
    for n in range(10):
        label = "Normal" if n < 6 else "Lung_Opacity"
        made = phantom(label, n, size=SIZE)
        path = folder / label / "images" / f"{label}-{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_grey(quantise(made.image)))
        if label != "Normal":
            y, x = (np.flatnonzero(made.lesion.any(axis=axis)) for axis in (1, 0))
            rows.append(f"{label}/images/{path.name},{x[0]},{y[0]},{x[-1] - x[0] + 1},{y[-1] - y[0] + 1},{label}")
    (folder / "boxes.csv").write_text("\n".join(rows) + "\n")
    return folder


def made_by(folder: Path, out: Path, *options: str) -> list[dict]:
    command = ["phantoms", str(out), "--onto", str(folder), "--patients", "12", "--size", str(SIZE), *options]
    result = CliRunner().invoke(main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads((out / "implants.json").read_text())["images"]


def pixels(out: Path, image: dict, kind: str) -> np.ndarray:
    data = (out / image["file"].replace("/images/", f"/{kind}/")).read_bytes()
    return decode_mask(data, SIZE) if kind in ("lesions", "masks") else decode(data)


def test_a_membrane_is_harmonic_and_meets_its_border() -> None:
    region = np.zeros((24, 30), bool)
    region[4:20, 5:25] = True
    y, x = np.mgrid[:24, :30] / 10
    plane = 0.2 + 0.3 * x - 0.1 * y + x * y  # harmonic: the solution is the function itself
    assert np.allclose(membrane(plane, region)[region], plane[region])
    assert not membrane(plane, region)[~region].any()
    region[:, :] = False
    region[0:10, 0:12] = True  # at the corner of the array the border is free
    solved = membrane(np.full(region.shape, 0.7), region)
    assert np.allclose(solved[region], 0.7)


@pytest.mark.parametrize("where", ["boxes", "anywhere"])
def test_a_transplant_changes_only_its_patch(boxed: Path, tmp_path: Path, where: str) -> None:
    images = made_by(boxed, tmp_path / "out", "--classes", "Lung_Opacity", "--transplants", where)
    for image in images:
        assert image["donor"].startswith("Lung_Opacity/")
        truth = pixels(tmp_path / "out", image, "ground_truth")
        assert np.array_equal(truth, decode((boxed / image["source"]).read_bytes()))
        change = np.abs(pixels(tmp_path / "out", image, "images") - truth)
        lesion = pixels(tmp_path / "out", image, "lesions")
        assert lesion.mean() >= 0.004
        assert change[lesion].min() > 0.045
        assert (change > 0.05).mean() < 0.5
        assert not change[[0, -1]].any()
        assert not change[:, [0, -1]].any()


def test_transplants_bring_the_lesion_along(boxed: Path, tmp_path: Path) -> None:
    """Patches of opacities brighten their hosts, those of the same boxes' anatomy would not."""
    images = made_by(boxed, tmp_path / "out", "--classes", "Lung_Opacity", "--transplants", "boxes")
    change = [
        (pixels(tmp_path / "out", image, "images") - pixels(tmp_path / "out", image, "ground_truth"))[
            pixels(tmp_path / "out", image, "lesions")
        ].mean()
        for image in images
    ]
    assert np.mean(change) > 0.03


def test_transplants_need_abnormal_images_of_the_class(boxed: Path, tmp_path: Path) -> None:
    with pytest.raises(UnusableData, match="no outlined lesion of class 'Effusion'"):
        Donors(open_dataset(boxed), "Normal", ["Normal", "Effusion"], SIZE, boxes=True)
    for option in (["--vary"], ["--transplants", "boxes"]):
        result = CliRunner().invoke(main, ["phantoms", str(tmp_path / "out"), *option])
        assert result.exit_code == 2
        assert f"{option[0]} needs --onto DATA" in result.output


def test_varied_images_keep_the_lesion_as_their_only_difference(boxed: Path, tmp_path: Path) -> None:
    images = made_by(boxed, tmp_path / "out", "--classes", "Normal,Lung_Opacity,Pneumothorax", "--vary")
    moved = 0
    for image in images:
        shown = pixels(tmp_path / "out", image, "images")
        original = decode((boxed / image["source"]).read_bytes())
        if image["label"] == "Normal":
            moved += not np.array_equal(shown, original)
            continue
        truth = pixels(tmp_path / "out", image, "ground_truth")
        moved += not np.array_equal(truth, original)
        far = ~pixels(tmp_path / "out", image, "masks")
        inside, outside = np.abs(shown - truth)[~far].mean(), np.abs(shown - truth)[far].mean()
        assert outside < 0.2 * inside  # sharpness carries a little across the border of the lungs
    assert moved == len(images)


def test_an_acquisition_moves_image_and_mask_together() -> None:
    made = phantom("Normal", 3, size=96)
    for seed in range(5):
        acquisition = Acquisition(np.random.default_rng(seed), 96)
        lungs = acquisition.place_mask(made.lungs)
        again = acquisition.place(made.lungs.astype(float)) > 0.5
        assert (lungs & again).sum() / (lungs | again).sum() > 0.9
        image = acquisition.expose(acquisition.place(made.image))
        assert image.min() >= 0
        assert image.max() <= 1
