"""What an image shows, one factor at a time: sides of findings, sex, view, age. The classifier scores what an edit
changed and what it kept; it never guides one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn
from torch.nn import functional

from diffva_ray.progress import one_line
from diffva_ray.storage.store import Store

GRID = 64  # side of the classifier's own pixel grid
CELLS = 4  # side of the grid of features that its last layer reads: a mean over the image would lose the side
FOLDER = "factors"  # of a model folder


@dataclass(frozen=True)
class Factor:
    """A question about an image, answered with yes or no, and how well held-out images were answered."""

    kind: str  # finding, sex, view or age
    value: str  # side of the finding, sex, view, or the age in years from which on the answer is yes
    label: str = ""  # class of the finding
    images: int = 0  # held-out images whose answer is known, each with its reconstruction
    accuracy: float | None = None  # on them
    chance: float | None = None  # accuracy of the more frequent answer

    @property
    def name(self) -> str:
        """The question in words."""
        words = {"finding": f"{self.label} on the {self.value}", "age": f"{self.value} years or older"}
        return words.get(self.kind, self.value)

    @property
    def otherwise(self) -> str:
        """What an image shows whose answer is no."""
        if self.kind == "age":
            return f"younger than {self.value} years"
        return {"F": "M", "AP": "PA"}.get(self.value, f"no {self.name}")


class FactorClassifier(nn.Module):
    """Convolutional classifier of grey images with one logit for each of ``factors``; ``width``: channels of the first
    layer."""

    def __init__(self, factors: Sequence[Factor], width: int = 16) -> None:
        super().__init__()
        self.factors, self.width = tuple(factors), width
        layers: list[nn.Module] = []
        for before, after in ((1, width), (width, 2 * width), (2 * width, 3 * width)):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(4, after), nn.SiLU()]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(CELLS), nn.Flatten())
        self.head = nn.Linear(3 * width * CELLS**2, len(self.factors))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [n, factors] of grey float32 images [n, H, W] in [0, 1], each standardised."""
        grid = functional.interpolate(images[:, None], size=(GRID, GRID), mode="bilinear", antialias=True)
        spread, mean = torch.std_mean(grid, dim=(1, 2, 3), keepdim=True)
        logits: torch.Tensor = self.head(self.features((grid - mean) / (spread + 1e-3)))
        return logits

    @torch.inference_mode()
    def probabilities(self, images: NDArray[np.float32]) -> NDArray[np.float64]:
        """Probabilities of yes [n, factors] for grey images [n, H, W] in [0, 1]."""
        device = next(self.parameters()).device
        logits: torch.Tensor = self(torch.from_numpy(np.asarray(images, np.float32)).to(device))
        return logits.sigmoid().double().cpu().numpy()


def measured(
    factors: Sequence[Factor], logits: NDArray[np.float64], answers: NDArray[np.float64]
) -> tuple[Factor, ...]:
    """The factors with their accuracy by ``logits`` and ``answers`` [n, factors]; nan: unknown, not counted."""
    found = []
    for n, factor in enumerate(factors):
        known = ~np.isnan(answers[:, n])
        yes = answers[known, n] > 0.5
        if len(yes):
            right = float(((logits[known, n] > 0) == yes).mean())
            factor = replace(factor, images=len(yes), accuracy=right, chance=float(max(yes.mean(), 1 - yes.mean())))
        found.append(factor)
    return tuple(found)


def save_factors(classifier: FactorClassifier, store: Store) -> None:
    """Write ``factors/model.safetensors`` and ``factors/config.json`` below the model folder."""
    config = {"factors": [asdict(factor) for factor in classifier.factors], "width": classifier.width}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in classifier.state_dict().items()}
    store.put(f"{FOLDER}/model.safetensors", save_safetensors(tensors))
    store.put(f"{FOLDER}/config.json", json.dumps(config).encode())


def load_factors(store: Store) -> FactorClassifier | None:
    """The factor classifier of a model folder, in evaluation mode; None without one. Raises ValueError for weights that
    do not fit."""
    try:
        data = store.read(f"{FOLDER}/config.json")
    except FileNotFoundError:
        return None
    try:
        config = json.loads(data)
        classifier = FactorClassifier([Factor(**factor) for factor in config["factors"]], config["width"])
        classifier.load_state_dict(load_safetensors(store.read(f"{FOLDER}/model.safetensors")))
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError, FileNotFoundError) as error:
        problem = f"not a factor classifier of this version ({one_line(error, 120)})"
        raise ValueError(f"{store.uri}/{FOLDER}: {problem}") from None
    return classifier.eval()
