"""Networks that turn images into the feature vectors FID and KID compare: pytorch-fid's Inception, and a stand-in.

The stand-in exists so that everything runs without a download; its distances are never called FID. Nothing is
downloaded unless ``download_inception`` is called.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# pytorch_fid imports torchvision, which fails next to a torch of another build; imported where it is used, it cannot
# take the stand-in down with it.

Resize = Literal["clean", "legacy"]


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """A feature network: ``extractor(images)`` is float32 [N, dimension] for float images [N, H, W] in [0, 1].

    ``resize`` names the way from the image to the network's grid; ``weights_sha256`` the weights. Both belong in every
    table beside ``name``. Images are run ``micro_batch`` at a time, so memory does not grow with N.
    """

    name: str
    dimension: int
    is_stand_in: bool
    weights_sha256: str
    resize: str
    micro_batch: int
    network: Callable[[torch.Tensor], torch.Tensor] = field(repr=False, compare=False)  # [B, 1, H, W] -> [B, dimension]
    device: str = "cpu"
    asked: str = field(default="", compare=False)  # NAME or NAME=PATH, by which it was chosen

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        if images.ndim != 3 or not np.issubdtype(images.dtype, np.floating):
            raise ValueError(f"{self.name} takes float images [N, H, W], got {images.dtype} {images.shape}")
        features = np.empty((len(images), self.dimension), dtype=np.float32)
        for start in range(0, len(images), self.micro_batch):
            part = np.ascontiguousarray(images[start : start + self.micro_batch], dtype=np.float32)
            batch = torch.from_numpy(part).unsqueeze(1).to(self.device)
            features[start : start + len(part)] = self.network(batch).float().cpu().numpy()
        return features


def stand_in() -> Extractor:
    """``stand-in-random-conv-64``: a small convolutional network with fixed random weights, 64 features, on the CPU.

    Images are resized to 64x64 (bilinear, antialiased); at each of four scales (64, 32, 16, 8 pixels) eight channels
    give a mean and a standard deviation. Distances in it tell equal from unequal sets; their size means nothing outside
    this extractor.
    """
    # Kaiming-normal from RandomState, whose stream NumPy has frozen (NEP 19); torch promises none across releases.
    random = np.random.RandomState(20240101)
    kernels = []
    for channels in (1, 8, 8, 8):
        kernel = random.standard_normal((8, channels, 5, 5)) * np.sqrt(2 / (channels * 5 * 5))
        kernels.append(torch.from_numpy(kernel.astype(np.float32)))
    sha256 = hashlib.sha256(b"".join(kernel.numpy().tobytes() for kernel in kernels)).hexdigest()

    def network(images: torch.Tensor) -> torch.Tensor:
        x = (resized(images, 64, "bilinear") - 0.5) / 0.25
        features = []
        for scale, kernel in enumerate(kernels):
            x = F.pad(F.avg_pool2d(x, 2) if scale else x, (2, 2, 2, 2), mode="reflect")
            x = F.relu(F.conv2d(x, kernel))
            features += [x.mean(dim=(2, 3)), x.std(dim=(2, 3), unbiased=False)]
        return torch.cat(features, dim=1)

    return Extractor(
        name="stand-in-random-conv-64",
        dimension=64,
        is_stand_in=True,
        weights_sha256=sha256,
        resize="antialiased-64",
        micro_batch=64,
        network=network,
    )


def inception(weights: str | Path, resize: Resize = "clean", grid: int | None = None, device: str = "cpu") -> Extractor:
    """pytorch-fid's Inception, pool3, 2048 features, from a file with its state dict; grey is replicated to 3 channels.

    ``legacy`` is pytorch-fid's own path: images as stored (all of one size per call), bilinear without antialiasing to
    299. Two sets stored at different sizes then differ by their resampling alone (Parmar 2022).
    ``clean`` squashes every image to ``grid`` x ``grid`` first (the counterfactuals' grid; None where both sets are on
    one grid already) and then to 299, both bicubic with antialiasing as in Pillow, so both sets go the same way.

    Raises ValueError, in one line that names the file, when it is not that state dict.
    """
    path = Path(weights)
    if resize not in ("clean", "legacy"):
        raise ValueError(f"resize is clean or legacy, got {resize!r}")
    blocks = inception_blocks()
    try:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        state = torch.load(path, map_location="cpu", weights_only=True)
        blocks.load_state_dict(_up_to_pool3(state), assign=True)
    except Exception as error:  # torch.load raises whatever the bytes of a foreign file lead it to
        expected = "pytorch-fid's Inception state dict, pt_inception-2015-12-05-6726825d.pth"
        raise ValueError(f"{path}: expected {expected} ({brief(error)})") from None
    blocks.eval().requires_grad_(False).to(device)
    blocks.to(memory_format=torch.channels_last)  # a quarter less time on a CPU

    def pool3(images: torch.Tensor) -> torch.Tensor:
        if resize == "legacy":
            x = F.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False)
        else:
            x = resized(resized(images, grid, "bicubic") if grid else images, 299, "bicubic")
        return blocks(2 * x.expand(-1, 3, -1, -1) - 1).flatten(1)

    return Extractor(
        name="inception-pool3",
        dimension=2048,
        is_stand_in=False,
        weights_sha256=sha256,
        resize=resize,
        micro_batch=16,
        network=pool3,
        device=device,
    )


# How pytorch_fid.inception.InceptionV3 strings torchvision's and its own layers together up to pool3; two poolings,
# without weights, stand between them.
LAYERS = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1"),
    *("Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2"),
    *("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    *("Mixed_7a", "Mixed_7b", "Mixed_7c"),
)


def inception_blocks() -> nn.Sequential:
    """The network [B, 3, 299, 299] in [-1, 1] -> [B, 2048, 1, 1], layers named as in torchvision, without weights
    (on the meta device: load with ``assign=True``).

    pytorch-fid builds it only together with a download (``fid_inception_v3``), so its own patched classes are put
    together here.
    """
    from pytorch_fid import inception as fid
    from torchvision.models import inception_v3

    with torch.device("meta"):  # initial values would be drawn from the global generator, only to be replaced
        network = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
        patched = {
            "Mixed_5b": fid.FIDInceptionA(192, pool_features=32),
            "Mixed_5c": fid.FIDInceptionA(256, pool_features=64),
            "Mixed_5d": fid.FIDInceptionA(288, pool_features=64),
            "Mixed_6b": fid.FIDInceptionC(768, channels_7x7=128),
            "Mixed_6c": fid.FIDInceptionC(768, channels_7x7=160),
            "Mixed_6d": fid.FIDInceptionC(768, channels_7x7=160),
            "Mixed_6e": fid.FIDInceptionC(768, channels_7x7=192),
            "Mixed_7b": fid.FIDInceptionE_1(1280),
            "Mixed_7c": fid.FIDInceptionE_2(2048),
        }
    blocks = nn.Sequential()
    for name in LAYERS:
        blocks.add_module(name, patched[name] if name in patched else getattr(network, name))
    blocks.add_module("pool3", nn.AdaptiveAvgPool2d((1, 1)))
    return blocks


def inception_cache() -> Path | None:
    """Where pytorch-fid's own download lies in torch.hub's cache, or None when it is not there."""
    path = _cache_path()
    return path if path.is_file() else None


def download_inception() -> Path:
    """pytorch-fid's weights, by its own means, in torch.hub's cache (95 MB; kept there, the checksum compared).

    Raises RuntimeError, in one line, when they cannot be fetched.
    """
    from pytorch_fid.inception import FID_WEIGHTS_URL

    try:
        torch.hub.load_state_dict_from_url(FID_WEIGHTS_URL, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong checksum is a RuntimeError
        raise RuntimeError(
            f"pytorch-fid's Inception weights cannot be downloaded ({brief(error)}); fetch {FID_WEIGHTS_URL} elsewhere"
        ) from None
    return _cache_path()


def _cache_path() -> Path:
    from pytorch_fid.inception import FID_WEIGHTS_URL

    return Path(torch.hub.get_dir()) / "checkpoints" / FID_WEIGHTS_URL.rsplit("/", 1)[-1]


def _up_to_pool3(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict without the classifier behind pool3."""
    return {key: value for key, value in state.items() if not key.startswith(("fc.", "AuxLogits."))}


def resized(images: torch.Tensor, side: int, mode: str) -> torch.Tensor:
    """[B, 1, H, W] squashed to ``side`` x ``side`` with antialiasing, in [0, 1] (bicubic overshoots)."""
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, size=(side, side), mode=mode, align_corners=False, antialias=True).clamp(0, 1)


def brief(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
