"""The autoencoder's adversary: a patch discriminator (Isola et al. 2017), its hinge loss, the adaptive weight of Esser
et al. 2021, and feature matching, a perceptual loss that needs no downloaded weights (Larsen et al. 2016; Wang et al.
2018, equation 2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional

LAYERS = 3  # after the first one; gives patches of 70 pixels, as in Isola et al. 2017


class PatchDiscriminator(nn.Module):
    """Classifies overlapping patches as real or reconstructed. Uses group instead of batch normalisation, so that the
    logits of an image do not depend on its batch or on the number of workers."""

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
        """Return logits [n, 1, h, w] of images [n, 3, H, W] in [-1, 1], and the features of every layer."""
        features = []
        for block in self.blocks:
            pixels = block(pixels)
            features.append(pixels)
        return self.head(pixels), features


def hinge_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Loss of the adversary: (E[max(0, 1 - D(x))] + E[max(0, 1 + D(x'))]) / 2, with x' the reconstruction of x."""
    return 0.5 * (functional.relu(1 - real).mean() + functional.relu(1 + fake).mean())


def feature_matching(real: list[torch.Tensor], fake: list[torch.Tensor]) -> torch.Tensor:
    """Mean over layers of the L1 distance between the features of image and reconstruction."""
    return torch.stack([(ours - target.detach()).abs().mean() for target, ours in zip(real, fake, strict=True)]).mean()


def adaptive_weight(reconstruction: torch.Tensor, adversarial: torch.Tensor, last_layer: torch.Tensor) -> torch.Tensor:
    """lambda = |grad of the reconstruction loss| / (|grad of the adversarial loss| + 1e-6), with both gradients taken
    at the decoder's ``last_layer``, clamped to [0, 1e4] (Esser et al. 2021, equation 7)."""
    reconstruction_norm = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)[0].norm()
    adversarial_norm = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0].norm()
    weight: torch.Tensor = reconstruction_norm / (adversarial_norm + 1e-6)
    return weight.clamp(0, 1e4).detach()


@contextmanager
def frozen(network: nn.Module) -> Iterator[nn.Module]:
    """Use the network as a fixed function: gradients pass through it and its parameters collect none."""
    before = [parameter.requires_grad for parameter in network.parameters()]
    network.requires_grad_(False)
    try:
        yield network
    finally:
        for parameter, trainable in zip(network.parameters(), before, strict=True):
            parameter.requires_grad_(trainable)
