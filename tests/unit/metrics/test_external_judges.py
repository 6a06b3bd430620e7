"""External judges: they equal their packages' own results, and unusable options give a one-line error."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from diffva_ray.data.phantoms import phantom
from diffva_ray.metrics.external_judges import OPACITIES, open_judge, open_judges
from diffva_ray.metrics.features import resized
from diffva_ray.metrics.validity import load_judge
from diffva_ray.storage.opening import open_store

IMAGES = np.stack([phantom(label, n, size=32).image for n, label in enumerate(("COVID", "Normal", "Lung_Opacity"))])
ALL = "nih-pc-chex-mimic_ch-google-openi-kaggle-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt"


@pytest.mark.parametrize("saved", ["module", "state"])
def test_torchxrayvision_equals_the_packages_own_output(saved: str, tmp_path: Path) -> None:
    xrv = pytest.importorskip("torchxrayvision.models")
    entry = next(entry for entry in xrv.model_urls.values() if entry["weights_url"].endswith(f"/{ALL}"))
    torch.manual_seed(0)
    network = xrv.DenseNet(num_classes=len(entry["labels"])).eval()
    torch.save(network if saved == "module" else network.state_dict(), tmp_path / ALL)
    judge = open_judge(f"torchxrayvision={tmp_path / ALL}")

    network.op_threshs = torch.tensor(entry["op_threshs"])
    with torch.inference_mode():
        grey = resized(torch.from_numpy(IMAGES)[:, None], 224, "bilinear")
        output = network((2 * grey - 1) * 1024).numpy()
    opacities = [n for n, label in enumerate(entry["labels"]) if label in OPACITIES]
    assert len(opacities) == 4
    np.testing.assert_allclose(judge.healthy(IMAGES), 1 - output[:, opacities].max(axis=1), rtol=1e-5)
    assert "Consolidation" in judge.says


def test_the_judge_of_a_model_is_that_judge(model: Path) -> None:
    own = load_judge(open_store(str(model)))
    assert own is not None
    judge = open_judge(f"judge={model}")
    np.testing.assert_array_equal(judge.healthy(IMAGES), own.healthy_probability(IMAGES))
    assert "Normal" in judge.says


def test_the_same_judge_twice_is_refused(model: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copy" / model.name
    shutil.copytree(model / "judge", copied / "judge")
    assert [judge.name for judge in open_judges([f"judge={model}"])] == [f"judge of {model.name}"]
    with pytest.raises(ValueError, match=f"^--judge judge={copied}: the same weights as --judge judge={model}"):
        open_judges([f"judge={model}", f"judge={copied}"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("crystal-ball=x", "torchxrayvision=PATH, judge=PATH"),
        ("judge", "judge=PATH"),
        ("judge=FOLDER", "no judge there"),
        ("torchxrayvision=FOLDER/absent.pt", "expected torchxrayvision"),
    ],
)
def test_an_unusable_option_is_one_line(option: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--judge ") as raised:
        open_judge(option.replace("FOLDER", str(tmp_path)))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_weights_without_operating_points_are_refused(tmp_path: Path) -> None:
    xrv = pytest.importorskip("torchxrayvision.models")
    torch.save(xrv.DenseNet().state_dict(), tmp_path / "renamed.pt")
    with pytest.raises(ValueError, match="no operating points for a file of this name"):
        open_judge(f"torchxrayvision={tmp_path / 'renamed.pt'}")
