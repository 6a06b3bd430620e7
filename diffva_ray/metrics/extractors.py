"""Feature networks besides Inception: torchxrayvision's DenseNet, RAD-DINO and the project's own judge. Weights are
given by path; nothing is downloaded.

A distance in the features of another network is not called FID; every row of a table names the network, its resizing
and the sha256 of its weights.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffva_ray.metrics.features import Extractor, Resize, brief, inception, resized, stand_in
from diffva_ray.metrics.validity import load_judge
from diffva_ray.provenance import missing
from diffva_ray.storage.opening import open_store

XRV_SIDE = 224

# Extractors by name. An opener takes the path of the weights, the device, and two options of Inception: its resizing,
# and the side of the counterfactuals' grid.
Opener = Callable[[str, str, Resize, int], Extractor]
EXTRACTORS: dict[str, Opener] = {
    "inception": lambda path, device, resize, side: inception(path, resize, side, device),
    "torchxrayvision": lambda path, device, resize, side: torchxrayvision(path, device),
    "rad-dino": lambda path, device, resize, side: rad_dino(path, device),
    "judge": lambda path, device, resize, side: judge_features(path, device),
    "stand-in": lambda path, device, resize, side: stand_in(),
}


def densenet(weights: str | Path) -> tuple[Any, str]:
    """torchxrayvision's DenseNet121 and the sha256 of its file: the pickled network that the package downloads, or a
    state dict. Unpickling allows the classes of this network only, so a file that would run other code is refused.

    Raises ValueError for another file, and without the package.
    """
    try:
        from torchxrayvision.models import DenseNet, _DenseBlock, _DenseLayer, _Transition
    except ImportError:
        raise ValueError(missing("torchxrayvision", "its DenseNet121", "xrv")) from None
    # The network, without initial values, which would use torch's global generator.
    path = Path(weights)
    layers = (nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.Linear)
    with torch.device("meta"):
        network = DenseNet()

    # Its weights; the classifier has as many outputs as the file.
    try:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        with torch.serialization.safe_globals([DenseNet, _DenseBlock, _DenseLayer, _Transition, *layers, set]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        state = loaded.state_dict() if isinstance(loaded, nn.Module) else loaded
        state = {key: value for key, value in state.items() if key.partition(".")[0] in ("features", "classifier")}
        if (findings := len(state["classifier.bias"])) != network.classifier.out_features:
            network.classifier = nn.Linear(network.classifier.in_features, findings, device="meta")
        network.load_state_dict(state, assign=True)
    except Exception as error:  # torch.load raises many types on the bytes of other files
        pickled = isinstance(error, pickle.UnpicklingError)  # torch's text advises to load the file without any check
        why = "it holds other classes than that network's" if pickled else brief(error)
        raise ValueError(f"{path}: expected torchxrayvision's DenseNet121 weights ({why})") from None
    return network.eval().requires_grad_(False), sha256


def torchxrayvision(weights: str | Path, device: str = "cpu") -> Extractor:
    """``features2`` of torchxrayvision's DenseNet121: 1024 features at 224 px; images are scaled to [-1024, 1024] as in
    that package. Raises ValueError as ``densenet``."""
    network, sha256 = densenet(weights)
    return Extractor(
        name="torchxrayvision-densenet121",
        dimension=1024,
        is_stand_in=False,
        weights_sha256=sha256,
        resize=f"clean-{XRV_SIDE}",
        micro_batch=16,
        network=partial(features2, network.to(device)),
        device=device,
    )


def features2(network: Any, images: torch.Tensor) -> torch.Tensor:
    """Input [n, 1024] of the last layer of torchxrayvision's DenseNet, for grey images [n, 1, H, W] in [0, 1]."""
    x = (2 * resized(images, XRV_SIDE, "bilinear") - 1) * 1024  # xrv.datasets.normalize
    return torch.relu(network.features(x)).mean(dim=(2, 3))


def rad_dino(folder: str | Path, device: str = "cpu") -> Extractor:
    """CLS token (after the last normalisation, transformers' ``pooler_output``) of a Dinov2 snapshot such as RAD-DINO.

    The snapshot's ``preprocessor_config.json`` sets side, mean and standard deviation; images are squashed to that side
    (bicubic, antialiased), grey in all three channels. Raises ValueError for another folder.
    """
    from transformers import Dinov2Config, Dinov2Model

    snapshot = Path(folder)
    # Configuration, network and digest of the snapshot.
    try:
        config = Dinov2Config.from_pretrained(snapshot, local_files_only=True)
        if json.loads((snapshot / "config.json").read_text()).get("model_type") != "dinov2":
            raise ValueError("its model_type is not dinov2")
        side, mean, deviation = _preprocessing(json.loads((snapshot / "preprocessor_config.json").read_text()))
        network = Dinov2Model.from_pretrained(snapshot, local_files_only=True)
        files = sorted([*snapshot.glob("*.safetensors"), *snapshot.glob("*.bin")])
        sha256 = _digest(files)
    except Exception as error:  # transformers raises OSError, KeyError, ValueError and its own
        raise ValueError(f"{snapshot}: expected a snapshot of RAD-DINO or another Dinov2 ({brief(error)})") from None
    network.eval().requires_grad_(False).to(device)
    centre = torch.tensor(mean, device=device).reshape(1, 3, 1, 1)
    scale = torch.tensor(deviation, device=device).reshape(1, 3, 1, 1)

    def cls(images: torch.Tensor) -> torch.Tensor:
        x = resized(images, side, "bicubic").expand(-1, 3, -1, -1)
        token: torch.Tensor = network(pixel_values=(x - centre) / scale).pooler_output
        return token

    return Extractor(
        name="rad-dino",
        dimension=config.hidden_size,
        is_stand_in=False,
        weights_sha256=sha256,
        resize=f"clean-{side}",
        micro_batch=8,
        network=cls,
        device=device,
    )


def _preprocessing(config: dict[str, Any]) -> tuple[int, list[float], list[float]]:
    """Side, mean and deviation of a transformers image processor."""
    size = config["crop_size"] if config.get("do_center_crop", True) and "crop_size" in config else config["size"]
    if isinstance(size, dict):
        size = size.get("height", size.get("shortest_edge"))
    return int(size), list(config["image_mean"]), list(config["image_std"])


def judge_features(model: str, device: str = "cpu") -> Extractor:
    """Input of the last layer (means and maxima of feature maps) of the judge of the model folder ``model``.

    The judge was trained on the labels of the same images, so a distance in its features compares how two sets show the
    classes. Raises ValueError for a model without a judge.
    """
    store = open_store(model)
    judge = load_judge(store)
    if judge is None:
        raise ValueError(f"{model} has no judge; name a model that has one")
    judge.requires_grad_(False).to(device)
    sha256 = hashlib.sha256(store.read("judge/model.safetensors")).hexdigest()
    return Extractor(
        name="judge",
        dimension=judge.head.in_features,
        is_stand_in=False,
        weights_sha256=sha256,
        resize="clean-64",
        micro_batch=64,
        network=lambda images: judge.embed(images[:, 0]),
        device=device,
    )


def _digest(files: list[Path]) -> str:
    """sha256 of the files' bytes in the order of their names; ValueError without any."""
    if not files:
        raise ValueError("no .safetensors or .bin file")
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()
