"""LPIPS (Zhang 2018): distance of two images in the features of AlexNet, by the ``lpips`` package."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffva_ray.metrics.features import brief
from diffva_ray.provenance import missing


@dataclass(frozen=True)
class Lpips:
    """LPIPS of two grey images [H, W] in [0, 1] at their own size: 0 for equal images, in practice below 1."""

    weights_sha256: str  # of the backbone
    network: Any = field(repr=False, compare=False)  # the package's LPIPS module

    @torch.inference_mode()
    def __call__(self, image: NDArray[np.float32], counterfactual: NDArray[np.float32]) -> float:
        if image.ndim != 2 or image.shape != counterfactual.shape or min(image.shape) < 32:
            raise ValueError(
                f"LPIPS takes two images [H, W] of one shape from 32 pixels, got {image.shape} and "
                f"{counterfactual.shape}"
            )
        pair = [
            torch.from_numpy(np.ascontiguousarray(x, np.float32)).expand(1, 3, -1, -1) for x in (image, counterfactual)
        ]
        return float(self.network(*pair, normalize=True))


def lpips(weights: str | Path) -> Lpips:
    """Load LPIPS v0.1 with torchvision's AlexNet state dict (alexnet-owt-7be5be79.pth); the linear layers come with the
    package. Raises ValueError for another file, and without the package."""
    try:
        import lpips as package
    except ImportError:
        raise ValueError(missing("lpips", "LPIPS", "lpips")) from None
    path = Path(weights)
    # A random backbone, replaced below; the package warns because it uses old names of torchvision.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = package.LPIPS(net="alex", pnet_rand=True, verbose=False)
    try:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        state = torch.load(path, map_location="cpu", weights_only=True)
        own = network.net.state_dict()  # slice2.3.weight is torchvision's features.3.weight
        network.net.load_state_dict({key: state["features." + key.partition(".")[2]] for key in own})
    except Exception as error:  # torch.load raises many types on the bytes of other files
        raise ValueError(f"{path}: expected torchvision's AlexNet state dict ({brief(error)})") from None
    return Lpips(sha256, network.eval().requires_grad_(False))
