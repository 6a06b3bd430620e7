"""LPIPS equals torchmetrics' own implementation with the same backbone; other files are refused."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffva_ray.metrics.perceptual import lpips

pytest.importorskip("lpips")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random AlexNet convolutions under torchvision's names (the classifier is not read)."""
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        state = models.alexnet(weights=None).state_dict()
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("lpips") / "alexnet.pth"
    convolutions = {key: 0.05 * torch.randn(value.shape, generator=generator)
                    for key, value in state.items() if key.startswith("features.")}  # fmt: skip
    torch.save({**convolutions, "classifier.6.bias": torch.zeros(1000)}, path)
    return path


def test_equals_torchmetrics(weights: Path) -> None:
    module = pytest.importorskip("torchmetrics.functional.image.lpips")
    x, y = np.random.default_rng(0).random((2, 64, 64), dtype=np.float32)
    measure = lpips(weights)
    theirs = module._LPIPS(pnet_rand=True)
    state = torch.load(weights)
    theirs.net.load_state_dict({key: state["features." + key.partition(".")[2]] for key in theirs.net.state_dict()})
    pair = [torch.from_numpy(image).expand(1, 3, -1, -1) for image in (x, y)]
    with torch.inference_mode():
        assert measure(x, y) == pytest.approx(float(theirs(*pair, normalize=True)), rel=1e-5)
    assert measure(x, x) == 0 < measure(x, 0.5 * x + 0.5 * y) < measure(x, y)
    assert measure(x, y) == lpips(weights)(x, y)
    with pytest.raises(ValueError, match="one shape from 32 pixels"):
        measure(x[:16, :16], y[:16, :16])


def test_without_the_package_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match=r"^lpips is needed for LPIPS.*diffva-ray\[lpips\]"):
        lpips(tmp_path / "alexnet.pth")


@pytest.mark.parametrize("content", ["missing", "text", "other network"])
def test_a_wrong_file_is_named_in_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    if content == "text":
        path.write_text("<html>404</html>")
    elif content == "other network":
        torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(ValueError, match="expected torchvision's AlexNet state dict") as raised:
        lpips(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
