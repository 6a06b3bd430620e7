"""Extractors equal their packages' own features; other files are refused by a one-line error."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffva_ray.metrics import extractors
from diffva_ray.metrics.features import resized
from diffva_ray.metrics.validity import Judge, save_judge
from diffva_ray.storage.local import LocalStore


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).random((2, 48, 48), dtype=np.float32)


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot in RAD-DINO's format (config, processor, safetensors), with two layers of random weights."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dino")
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    torch.manual_seed(0)
    Dinov2Model(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 28}, "crop_size": 28}
    BitImageProcessor(**size, image_mean=[0.53] * 3, image_std=[0.26] * 3).save_pretrained(folder)
    return folder


def test_torchxrayvision_equals_its_own_features(images: np.ndarray, tmp_path: Path) -> None:
    xrv = pytest.importorskip("torchxrayvision.models")
    torch.manual_seed(0)
    network = xrv.DenseNet().eval()
    torch.save(network, tmp_path / "module.pt")  # the format of the package's downloads
    torch.save(network.state_dict(), tmp_path / "state.pt")
    with torch.inference_mode():
        grey = resized(torch.from_numpy(images)[:, None], 224, "bilinear")
        expected = network.features2((2 * grey - 1) * 1024).numpy()
    before = torch.random.get_rng_state()
    for name in ("module.pt", "state.pt"):
        extractor = extractors.torchxrayvision(tmp_path / name)
        np.testing.assert_allclose(extractor(images), expected, rtol=1e-5)
        metadata = (extractor.name, extractor.dimension, extractor.resize, extractor.is_stand_in)
        assert metadata == ("torchxrayvision-densenet121", 1024, "clean-224", False)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_the_package_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchxrayvision.models", None)
    with pytest.raises(ValueError, match=r"torchxrayvision is needed for .*diffva-ray\[xrv\]"):
        extractors.torchxrayvision(tmp_path / "weights.pt")


class Command:
    """An object that runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize("content", ["missing", "text", "other network", "code"])
def test_a_file_of_another_kind_is_refused(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchxrayvision.models")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pt"
    if content == "text":
        path.write_text("<html>404</html>")
    elif content == "other network":
        torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    elif content == "code":
        torch.save(Command(), path)
    with pytest.raises(ValueError, match="expected torchxrayvision's DenseNet121 weights") as raised:
        extractors.torchxrayvision(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "ran").exists()


def test_rad_dino_is_the_cls_token_of_its_own_processing(images: np.ndarray, dino: Path) -> None:
    from transformers import AutoImageProcessor, AutoModel

    extractor = extractors.rad_dino(dino)
    on_grid = resized(torch.from_numpy(images)[:, None], 28, "bicubic").expand(-1, 3, -1, -1)
    processor = AutoImageProcessor.from_pretrained(dino, local_files_only=True)
    inputs = processor(on_grid, do_rescale=False, do_resize=False, return_tensors="pt")
    with torch.inference_mode():
        network = AutoModel.from_pretrained(dino, local_files_only=True).eval()
        expected = network(**inputs).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(extractor(images), expected, rtol=1e-4, atol=1e-5)
    assert (extractor.name, extractor.dimension, extractor.resize) == ("rad-dino", 16, "clean-28")
    assert len(extractor.weights_sha256) == 64


@pytest.mark.parametrize("change", ["no folder", "another model", "no processor", "no weights"])
def test_another_folder_is_no_rad_dino(change: str, dino: Path, tmp_path: Path) -> None:
    if change != "no folder":
        for file in dino.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    if change == "another model":
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    elif change == "no processor":
        (tmp_path / "preprocessor_config.json").unlink()
    elif change == "no weights":
        (tmp_path / "model.safetensors").unlink()
    folder = tmp_path / "nowhere" if change == "no folder" else tmp_path
    with pytest.raises(ValueError, match="expected a snapshot of RAD-DINO") as raised:
        extractors.rad_dino(folder)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_judges_last_layer_on_its_features_gives_its_logits(images: np.ndarray, tmp_path: Path) -> None:
    torch.manual_seed(0)
    judge = Judge(["COVID", "Normal"], "Normal", width=4).eval()
    save_judge(judge, LocalStore(str(tmp_path)))
    extractor = extractors.judge_features(str(tmp_path))
    with torch.inference_mode():
        expected = judge(torch.from_numpy(images)).numpy()
        logits = judge.head(torch.from_numpy(extractor(images))).numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-5)
    assert (extractor.name, extractor.dimension) == ("judge", 32)
    with pytest.raises(ValueError, match="has no judge"):
        extractors.judge_features(str(tmp_path / "empty"))
