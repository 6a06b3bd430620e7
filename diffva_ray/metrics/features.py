"""Feature networks for FID and KID: pytorch-fid's Inception, and a random-feature extractor ("stand-in").

The stand-in lets everything run without a download; its distances are never called FID. Only ``download_inception``
downloads anything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from diffva_ray.provenance import missing

WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"  # pytorch-fid's file
Resize = Literal["clean", "legacy"]


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """A feature network: a call turns float images [N, H, W] in [0, 1] into float32 features [N, dimension].

    Name, resizing and weights belong in every table of distances.
    """

    name: str  # of the network, in tables
    dimension: int  # features per image
    is_stand_in: bool  # whether the weights are random
    weights_sha256: str  # of the weights
    resize: str  # how images get to the network's grid: clean, legacy, clean-SIDE, antialiased-SIDE
    micro_batch: int  # images per network call, so that memory does not grow with N
    network: Callable[[torch.Tensor], torch.Tensor] = field(repr=False, compare=False)  # [B, 1, H, W] -> [B, dimension]
    device: str = "cpu"  # cpu or cuda
    asked: str = field(default="", compare=False)  # the option that chose it: NAME or NAME=PATH

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
    """Random-feature extractor ``stand-in-random-conv-64``: a small network with fixed random weights, on the CPU.

    Images are resized to 64x64 (bilinear, antialiased). The 64 features are mean and standard deviation of eight
    channels at four scales (64, 32, 16, 8 pixels). Distances distinguish equal from unequal sets; their size has no
    meaning outside this extractor.

    Returns:
        The extractor, with 64 features.
    """
    # Kaiming-normal weights from RandomState, whose stream NumPy has frozen (NEP 19); torch's may change.
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
    """pytorch-fid's Inception, pool3, 2048 features; grey images are replicated to 3 channels.

    Args:
        weights: File with pytorch-fid's state dict.
        resize: ``legacy`` is pytorch-fid's own: bilinear without antialiasing from the stored size (one per call) to
            299; two sets stored at different sizes then differ by their resampling alone (Parmar 2022). ``clean``
            resizes every image to ``grid`` and then to 299, both bicubic with antialiasing as in Pillow, so both sets
            are resampled alike.
        grid: Side of the counterfactuals' grid, in pixels; None if both sets are on one grid already.
        device: ``cpu`` or ``cuda``.

    Returns:
        The extractor, with 2048 features.

    Raises:
        ValueError: If the file is not that state dict (the message names the file), ``resize`` is unknown, or
            pytorch-fid is not installed.
    """
    path = Path(weights)
    if resize not in ("clean", "legacy"):
        raise ValueError(f"resize is clean or legacy, got {resize!r}")
    # Weights, without those of the classifier behind pool3.
    blocks = inception_blocks()
    try:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        state = torch.load(path, map_location="cpu", weights_only=True)
        pool3_state = {key: value for key, value in state.items() if not key.startswith(("fc.", "AuxLogits."))}
        blocks.load_state_dict(pool3_state, assign=True)
    except Exception as error:  # torch.load raises many types on the bytes of other files
        raise ValueError(f"{path}: expected pytorch-fid's Inception state dict, {WEIGHTS} ({brief(error)})") from None
    blocks.eval().requires_grad_(False).to(device)
    blocks.to(memory_format=torch.channels_last)  # a quarter less time on a CPU

    def pool3(images: torch.Tensor) -> torch.Tensor:
        if resize == "legacy":
            x = F.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False)
        else:
            x = resized(resized(images, grid, "bicubic") if grid else images, 299, "bicubic")
        pooled: torch.Tensor = blocks(2 * x.expand(-1, 3, -1, -1) - 1)
        return pooled.flatten(1)

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


# Layers of pytorch_fid.inception.InceptionV3 up to pool3, torchvision's and its own, with two poolings without weights.
LAYERS = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1"),
    *("Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2"),
    *("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    *("Mixed_7a", "Mixed_7b", "Mixed_7c"),
)


def inception_blocks() -> nn.Sequential:
    """Inception [B, 3, 299, 299] in [-1, 1] -> [B, 2048, 1, 1] without weights, layers named as in torchvision.

    It is on the meta device: load the weights with ``assign=True``. It is assembled here from pytorch-fid's patched
    classes, because pytorch-fid itself builds it only together with a download (``fid_inception_v3``).
    """
    fid = pytorch_fid_inception()
    from torchvision.models import inception_v3

    with torch.device("meta"):  # initial values would use torch's global generator
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


def pytorch_fid_inception() -> Any:
    """Import pytorch-fid's module of networks. Raises ValueError, one line, if the package is not installed."""
    try:
        from pytorch_fid import inception
    except ImportError:
        raise ValueError(missing("pytorch-fid", "Inception features (FID)", "fid")) from None
    return inception


def inception_cache() -> Path | None:
    """Path of pytorch-fid's weights in torch.hub's cache; None if they are not there, or the package is not."""
    path = _cache_path()
    return path if path.is_file() and find_spec("pytorch_fid") else None


def download_inception() -> Path:
    """Download pytorch-fid's weights (95 MB) to torch.hub's cache and check their checksum.

    Returns:
        Path of the file.

    Raises:
        RuntimeError: If the download fails; the message is one line.
        ValueError: If pytorch-fid is not installed.
    """
    url = pytorch_fid_inception().FID_WEIGHTS_URL
    try:
        torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong checksum is a RuntimeError
        raise RuntimeError(
            f"pytorch-fid's Inception weights cannot be downloaded ({brief(error)}); fetch {url} elsewhere"
        ) from None
    return _cache_path()


def _cache_path() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS


def resized(images: torch.Tensor, side: int, mode: str) -> torch.Tensor:
    """Images [B, 1, H, W] squashed to ``side`` x ``side`` with antialiasing, clamped to [0, 1] (bicubic overshoots)."""
    if images.shape[-2:] == (side, side):
        return images
    return F.interpolate(images, size=(side, side), mode=mode, align_corners=False, antialias=True).clamp(0, 1)


def brief(error: Exception) -> str:
    """The error's text on one line, at most 160 characters."""
    return " ".join(str(error).split())[:160] or type(error).__name__
