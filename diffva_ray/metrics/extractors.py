"""Other feature networks by name: torchxrayvision's DenseNet, RAD-DINO, and the project's own judge. Weights come by
path and nothing is ever downloaded.

A distance in another network's features is no FID; every row of a table names the network, its resize path and the
sha256 of its weights.
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
from diffva_ray.storage.store import open_store

XRV_SIDE = 224

# Extractors by name. An opener takes the path of the weights, the device, and what Inception alone knows: the way to
# its grid, and the side of the images' own grid.
Opener = Callable[[str, str, Resize, int], Extractor]
EXTRACTORS: dict[str, Opener] = {
    "inception": lambda path, device, resize, side: inception(path, resize, side, device),
    "torchxrayvision": lambda path, device, resize, side: torchxrayvision(path, device),
    "rad-dino": lambda path, device, resize, side: rad_dino(path, device),
    "judge": lambda path, device, resize, side: judge_features(path, device),
    "stand-in": lambda path, device, resize, side: stand_in(),
}


def densenet(weights: str | Path) -> tuple[Any, str]:
    """torchxrayvision's DenseNet121 and the sha256 of its file, which is one as that package downloads it (a pickled
    DenseNet) or its state dict. It is read with the classes of that network alone, so a file that would run other code
    is refused. Raises ValueError, one line, for another file and when the package is missing.
    """
    try:
        from torchxrayvision.models import DenseNet, _DenseBlock, _DenseLayer, _Transition
    except ImportError:
        raise ValueError(missing("torchxrayvision", "its DenseNet121", "xrv")) from None
    path = Path(weights)
    layers = (nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.Linear)
    with torch.device("meta"):  # initial values would be drawn from the global generator, only to be replaced
        network = DenseNet()
    try:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        with torch.serialization.safe_globals([DenseNet, _DenseBlock, _DenseLayer, _Transition, *layers, set]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        state = loaded.state_dict() if isinstance(loaded, nn.Module) else loaded
        state = {key: value for key, value in state.items() if key.partition(".")[0] in ("features", "classifier")}
        if (findings := len(state["classifier.bias"])) != network.classifier.out_features:
            network.classifier = nn.Linear(network.classifier.in_features, findings, device="meta")
        network.load_state_dict(state, assign=True)
    except Exception as error:  # torch.load raises whatever the bytes of a foreign file lead it to
        pickled = isinstance(error, pickle.UnpicklingError)  # its text advises to load the file without any check
        why = "it holds other classes than that network's" if pickled else brief(error)
        raise ValueError(f"{path}: expected torchxrayvision's DenseNet121 weights ({why})") from None
    return network.eval().requires_grad_(False), sha256


def torchxrayvision(weights: str | Path, device: str = "cpu") -> Extractor:
    """``features2`` of torchxrayvision's DenseNet121: 1024 features at 224 px, images scaled to [-1024, 1024] as there.
    Raises ValueError as ``densenet``."""
    network, sha256 = densenet(weights)
    network.to(device)
    features = partial(features2, network)
    return Extractor(
        name="torchxrayvision-densenet121",
        dimension=1024,
        is_stand_in=False,
        weights_sha256=sha256,
        resize=f"clean-{XRV_SIDE}",
        micro_batch=16,
        network=features,
        device=device,
    )


def features2(network: Any, images: torch.Tensor) -> torch.Tensor:
    """What torchxrayvision's DenseNet sees [n, 1024] before its last layer, of grey images [n, 1, H, W] in [0, 1]."""
    x = (2 * resized(images, XRV_SIDE, "bilinear") - 1) * 1024  # xrv.datasets.normalize
    return torch.relu(network.features(x)).mean(dim=(2, 3))


def rad_dino(folder: str | Path, device: str = "cpu") -> Extractor:
    """CLS token (after the last normalisation, transformers' ``pooler_output``) of a Dinov2 snapshot such as RAD-DINO.

    Side, mean and standard deviation are those of the snapshot's ``preprocessor_config.json``; images are squashed to
    the side (bicubic, antialiased), grey in all three channels. Raises ValueError, one line, for another folder.
    """
    from transformers import Dinov2Config, Dinov2Model

    place = Path(folder)
    try:
        config = Dinov2Config.from_pretrained(place, local_files_only=True)
        if json.loads((place / "config.json").read_text()).get("model_type") != "dinov2":
            raise ValueError("its model_type is not dinov2")
        side, mean, deviation = _preprocessing(json.loads((place / "preprocessor_config.json").read_text()))
        network = Dinov2Model.from_pretrained(place, local_files_only=True)
        files = sorted([*place.glob("*.safetensors"), *place.glob("*.bin")])
        sha256 = _digest(files)
    except Exception as error:  # transformers raises OSError, KeyError, ValueError and its own
        raise ValueError(f"{place}: expected a snapshot of RAD-DINO or another Dinov2 ({brief(error)})") from None
    network.eval().requires_grad_(False).to(device)
    centre = torch.tensor(mean, device=device).reshape(1, 3, 1, 1)
    scale = torch.tensor(deviation, device=device).reshape(1, 3, 1, 1)

    def cls(images: torch.Tensor) -> torch.Tensor:
        x = resized(images, side, "bicubic").expand(-1, 3, -1, -1)
        return network(pixel_values=(x - centre) / scale).pooler_output

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


def _preprocessing(about: dict[str, Any]) -> tuple[int, list[float], list[float]]:
    """Side, mean and deviation of a transformers image processor."""
    size = about["crop_size"] if about.get("do_center_crop", True) and "crop_size" in about else about["size"]
    if isinstance(size, dict):
        size = size.get("height", size.get("shortest_edge"))
    return int(size), list(about["image_mean"]), list(about["image_std"])


def judge_features(model: str, device: str = "cpu") -> Extractor:
    """What the judge of the model folder ``model`` sees before its last layer (means and maxima of its maps).

    It was trained on the same images' labels, so a distance in it asks what it asks: whether a set shows the classes
    alike. Raises ValueError, one line, for a model without a judge.
    """
    store = open_store(model)
    judge = load_judge(store)
    if judge is None:
        raise ValueError(f"{model} has no judge; name a model that has one")
    judge.requires_grad_(False).to(device)
    sha256 = hashlib.sha256(store.read("judge/model.safetensors")).hexdigest()

    def penultimate(images: torch.Tensor) -> torch.Tensor:
        return judge.embed(images[:, 0])

    return Extractor(
        name="judge",
        dimension=judge.head.in_features,
        is_stand_in=False,
        weights_sha256=sha256,
        resize="clean-64",
        micro_batch=64,
        network=penultimate,
        device=device,
    )


def _digest(files: list[Path]) -> str:
    """sha256 of the files' bytes in the order of their names; ValueError without any."""
    if not files:
        raise ValueError("no .safetensors or .bin file")
    found = hashlib.sha256()
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest()
