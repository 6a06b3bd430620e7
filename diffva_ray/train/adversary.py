"""The adversary of the autoencoder: a patch discriminator (Isola et al. 2017), its hinge loss, the adaptive weight of
Esser et al. 2021, and feature matching as a perceptual loss without downloaded weights (Larsen et al. 2016; Wang et al.
2018, equation 2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional

LAYERS = 3  # behind the first: patches of 70 pixels, as in Isola et al. 2017


class PatchDiscriminator(nn.Module):
    """Logits of overlapping patches: real image, or the autoencoder's. Normalised by groups, not by batch, so that a
    image's logits do not depend on its neighbours or on the number of workers."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        blocks: list[nn.Module] = [nn.Sequential(nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2))]
        channels = width
        for depth in range(1, LAYERS + 1):
            out, stride = width * 2 ** min(depth, 3), 2 if depth < LAYERS else 1
            blocks.append(
                nn.Sequential(
                    nn.Conv2d(channels, out, 4, stride, 1, bias=False), nn.GroupNorm(8, out), nn.LeakyReLU(0.2)
                )
            )
            channels = out
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Conv2d(channels, 1, 4, 1, 1)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits [n, 1, h, w] of images [n, 3, H, W] in [-1, 1], and the features of every layer."""
        features = []
        for block in self.blocks:
            pixels = block(pixels)
            features.append(pixels)
        return self.head(pixels), features


def hinge_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """The adversary's loss of its logits: E[max(0, 1 - D(x))] + E[max(0, 1 + D(D(E(x))))], halved."""
    return 0.5 * (functional.relu(1 - real).mean() + functional.relu(1 + fake).mean())


def feature_matching(real: list[torch.Tensor], fake: list[torch.Tensor]) -> torch.Tensor:
    """Mean over layers of the L1 distance between features of image and reconstruction."""
    return torch.stack([(ours - theirs.detach()).abs().mean() for theirs, ours in zip(real, fake, strict=True)]).mean()


def adaptive_weight(reconstruction: torch.Tensor, adversarial: torch.Tensor, last_layer: torch.Tensor) -> torch.Tensor:
    """lambda = |grad of the reconstruction loss| / (|grad of the adversarial loss| + 1e-6), both at the decoder's last
    layer, clamped to [0, 1e4] (Esser et al. 2021, equation 7)."""
    ours = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)[0].norm()
    theirs = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0].norm()
    return (ours / (theirs + 1e-6)).clamp(0, 1e4).detach()


@contextmanager
def frozen(network: nn.Module) -> Iterator[nn.Module]:
    """The network as a fixed function: gradients go through it and leave nothing in it."""
    before = [parameter.requires_grad for parameter in network.parameters()]
    network.requires_grad_(False)
    try:
        yield network
    finally:
        for parameter, trainable in zip(network.parameters(), before, strict=True):
            parameter.requires_grad_(trainable)
