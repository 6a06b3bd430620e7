"""Charachon et al. 2021, "Visual explanation by unifying adversarial generation and feature importance attributions"
(method ``charachon``): two generators explain a classifier f. The similar one keeps f's decision, the adversarial one
turns it, and both stay close to the image and to each other,

    loss = CE(f(g_s(x)), f(x)) + CE(f(g_a(x)), 1 - f(x))
           + distance_weight (|x - g_s(x)|_1 + |x - g_a(x)|_1) + closeness_weight |g_s(x) - g_a(x)|_1.

The map is their difference, so that what both lose of the image cancels, times the mean gradient of f on the straight
path between them (``generate.references.gradients: false``: the difference alone).

Differences: written from the abstract and from what the paper says of it; cross-entropies and weights are ours. The
gradient is smoothed over SMOOTHING pixels and scaled to at most 1 in each image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn
from torch.nn import functional

from diffva_ray.config.reference_stages import CharachonConfig
from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion
from diffva_ray.model.gan_generator import GanGenerator
from diffva_ray.references.gan import signed
from diffva_ray.references.image_classifier import ExplainerStage, classifier_of
from diffva_ray.train.stage import Inputs, StageContext

POINTS = (0.125, 0.375, 0.625, 0.875)  # of the path
SMOOTHING = 5


class Pair(ModelMixin, ConfigMixin):
    """The similar and the adversarial generator."""

    @register_to_config  # type: ignore[untyped-decorator]  # of diffusers
    def __init__(
        self, block_out_channels: Sequence[int], norm_num_groups: int, measured: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of diffusers
        self.similar: Any = GanGenerator("map", block_out_channels, norm_num_groups)
        self.adversarial: Any = GanGenerator("map", block_out_channels, norm_num_groups)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both images of images [n, 1, H, W] in [-1, 1]."""
        return self.similar(images), self.adversarial(images)


def generate(model: LatentDiffusion, request: Edit) -> Generated:
    """The similar image minus the weighted difference; the similar image is the reconstruction. Raises UnusableModel
    without the generators or the classifier."""
    pair = model.bundle.extra("charachon").to(request.images.device, torch.float32).eval().requires_grad_(False)
    similar, adversarial = ((made[:, 0] / 2 + 0.5).clamp(0, 1) for made in pair(request.images[:, None] * 2 - 1))
    if not request.config.references.gradients:
        return Generated(adversarial, similar)
    weight = path_gradient(classifier_of(model), similar, adversarial)
    return Generated(similar - weight * (similar - adversarial), similar)


def path_gradient(classifier: Any, similar: torch.Tensor, adversarial: torch.Tensor) -> torch.Tensor:
    """Mean |gradient| of the log odds on the path between two images [n, H, W], smoothed, in [0, 1]."""
    total = torch.zeros_like(similar)
    for point in POINTS:
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.lerp(similar, adversarial, point).clone().requires_grad_()
            total = total + torch.autograd.grad(classifier.log_odds(x).sum(), x)[0].abs()
    smooth = functional.avg_pool2d(total[:, None], SMOOTHING, 1, SMOOTHING // 2, count_include_pad=False)[:, 0]
    return smooth / smooth.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)


class CharachonStage(ExplainerStage):
    """Trains both generators."""

    config: CharachonConfig
    name = "charachon"

    def __init__(self, context: StageContext, config: CharachonConfig) -> None:
        super().__init__(context, config)
        self.gan_generator = Pair(config.block_out_channels, config.norm_num_groups)
        self.register({}, self.gan_generator, None)

    def counterfactual(self, images: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.gan_generator.adversarial(images)
        return made

    def loss(self, network: nn.Module, inputs: Inputs) -> torch.Tensor:
        x = torch.cat([signed(inputs["healthy"]), signed(inputs["abnormal"])])
        with torch.no_grad():
            own = (self.log_odds(x) > 0).float()
        similar, adversarial = network(x)
        decision = functional.binary_cross_entropy_with_logits
        decisions: torch.Tensor = decision(self.log_odds(similar), own) + decision(self.log_odds(adversarial), 1 - own)
        distance: torch.Tensor = (x - similar).abs().mean() + (x - adversarial).abs().mean()
        closeness: torch.Tensor = (similar - adversarial).abs().mean()
        return decisions + self.config.distance_weight * distance + self.config.closeness_weight * closeness
