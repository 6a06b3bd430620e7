"""Validity: whether a judge calls the counterfactual healthy. The judge is a small classifier, trained on the labels of
the same images; it never guides a counterfactual."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from torch import nn
from torch.nn import functional

from diffva_ray.progress import one_line
from diffva_ray.storage.store import Store

GRID = 64  # side of the judge's own pixel grid


class Judge(nn.Module):
    """Convolutional classifier of grey images into sorted ``classes``; ``healthy`` is the one that a counterfactual
    should get, ``width`` the channels of the first layer.

    One temperature calibrates its probabilities (Guo et al. 2017); the most probable class stays the same."""

    temperature: torch.Tensor  # scalar divisor of the logits

    def __init__(self, classes: Sequence[str], healthy: str, width: int = 16) -> None:
        super().__init__()
        self.classes, self.healthy, self.width = tuple(classes), healthy, width
        layers: list[nn.Module] = []
        channels = 1
        for out, stride in ((width, 2), (2 * width, 2), (4 * width, 1), (4 * width, 2), (4 * width, 1)):
            layers += [nn.Conv2d(channels, out, 5 if channels == 1 else 3, stride, padding=2 if channels == 1 else 1)]
            layers += [nn.GroupNorm(4, out), nn.SiLU()]
            channels = out
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(2 * channels, len(self.classes))
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [n, classes] of grey float32 images [n, H, W] in [0, 1], before calibration."""
        logits: torch.Tensor = self.head(self.embed(images))
        return logits

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Input of the last layer: means and maxima [n, 8 * width] of the feature maps of grey images [n, H, W] in
        [0, 1]. Each image is standardised on the judge's grid."""
        grid = functional.interpolate(images[:, None], size=(GRID, GRID), mode="bilinear", antialias=True)
        spread, mean = torch.std_mean(grid, dim=(1, 2, 3), keepdim=True)
        maps = self.features((grid - mean) / (spread + 1e-3))
        return torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)

    @torch.inference_mode()
    def healthy_probability(self, images: NDArray[np.float32]) -> NDArray[np.float64]:
        """Probability [n] of the healthy class for grey images [n, H, W] in [0, 1]. Images are judged one by one, so
        that a result does not depend on the batch. Raises torch's RuntimeError for another shape."""
        index = self.classes.index(self.healthy)
        rows = [self._calibrated(image[None])[0, index].item() for image in images]
        return np.array(rows, dtype=np.float64)

    @torch.inference_mode()
    def probabilities(self, images: NDArray[np.float32]) -> NDArray[np.float64]:
        """Calibrated probabilities [n, classes] of grey images [n, H, W] in [0, 1], in one batch. Raises torch's
        RuntimeError for another shape."""
        return self._calibrated(images).double().cpu().numpy()

    def _calibrated(self, images: NDArray[np.float32]) -> torch.Tensor:
        device = next(self.parameters()).device
        logits: torch.Tensor = self(torch.from_numpy(np.asarray(images, np.float32)).to(device))
        return (logits / self.temperature).softmax(1)


def fitted_temperature(logits: NDArray[np.float64], targets: NDArray[np.int64]) -> float:
    """The temperature, between exp(-3) and exp(3), at which ``logits`` [n, classes] have the least cross-entropy with
    ``targets`` [n] (Guo et al. 2017, section 4.2)."""

    def cross_entropy(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        return float(np.mean(logsumexp(scaled, axis=1) - scaled[np.arange(len(targets)), targets]))

    return float(np.exp(minimize_scalar(cross_entropy, bounds=(-3, 3), method="bounded").x))


def calibration_error(probabilities: NDArray[np.float64], targets: NDArray[np.int64], bins: int = 10) -> float:
    """Expected calibration error in [0, 1] (Guo et al. 2017, equation 3) of probabilities [n, classes] and indices of
    the true classes [n]: mean distance of confidence and accuracy over ``bins`` of equal width."""
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == targets
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(confidence[bin_of == n].sum() - correct[bin_of == n].sum()) for n in range(bins)]
    return float(sum(gaps) / len(targets))


def save_judge(judge: Judge, store: Store, calibration: Mapping[str, float] | None = None) -> None:
    """Write ``judge/model.safetensors`` and ``judge/config.json`` below the model folder; ``calibration`` holds results
    on images held out of its training."""
    config: dict[str, Any] = {"classes": list(judge.classes), "healthy": judge.healthy, "width": judge.width}
    config["calibration"] = dict(calibration or {})
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in judge.state_dict().items()}
    store.put("judge/model.safetensors", save_safetensors(tensors))
    store.put("judge/config.json", json.dumps(config).encode())


def load_judge(store: Store) -> Judge | None:
    """The judge of a model folder, in evaluation mode; None without one. Raises ValueError for weights that do not fit,
    and for a judge without its healthy class."""
    try:
        data = store.read("judge/config.json")
    except FileNotFoundError:
        return None
    try:
        config = json.loads(data)
        classes, healthy, width = config["classes"], config["healthy"], config["width"]
        known = healthy in classes
        judge = Judge(classes, healthy, width)
        weights = load_safetensors(store.read("judge/model.safetensors"))
        judge.load_state_dict({"temperature": torch.ones(()), **weights})  # older judges have none
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{store.uri}/judge: not a judge of this version ({one_line(error, 120)})") from None
    if not known:
        raise ValueError(f"{store.uri}/judge: it does not know the healthy class {healthy}; train one that does")
    return judge.eval()
