"""VA-GAN (Baumgartner et al. 2018, "Visual feature attribution using Wasserstein GANs", section 3): learns the smallest
map M such that a critic cannot distinguish x + M(x) from healthy images,

    min_M max_D  E_healthy[D(x)] - E_abnormal[D(x + M(x))] + map_weight * |M(x)|_1  (mean over pixels),

where a gradient penalty keeps D Lipschitz 1. Both losses, and the weights 100 and 10, are the published ones.

Differences: our networks instead of a U-Net of batch normalisation and a C3D-like critic; a critic at twice the
learning rate instead of five updates in each step (100 at the start); the norm of the penalty's gradient is taken over
the whole image, as in Gulrajani et al., while the authors' code takes it over one axis.
"""

from __future__ import annotations

import torch
from torch import nn

from diffva_ray.config.reference_stages import VaGanConfig
from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion
from diffva_ray.references.gan import GanStage, WassersteinCritic, one_pass, score, signed
from diffva_ray.train.adversary import PatchDiscriminator, frozen
from diffva_ray.train.stage import Inputs, StageContext


def generate(model: LatentDiffusion, request: Edit) -> Generated:
    """Apply the network ``va_gan``. Raises UnusableModel without it."""
    return one_pass(model, request, "va_gan")


class VaGanStage(GanStage):
    """Trains the map and its critic."""

    config: VaGanConfig
    name = "va_gan"

    def __init__(self, context: StageContext, config: VaGanConfig) -> None:
        super().__init__(context, config)
        self.gan_generator = self.make_generator("map")
        self.critic = PatchDiscriminator(config.critic_channels)
        network = WassersteinCritic(self.critic, config.penalty_weight)
        self.register({"critic": self.critic}, self.gan_generator, network)

    def loss(self, network: nn.Module, inputs: Inputs) -> torch.Tensor:
        abnormal = signed(inputs["abnormal"])
        generated: torch.Tensor = network(abnormal)
        with frozen(self.critic) as critic, torch.autocast(generated.device.type, enabled=False):
            return self.config.map_weight * (generated - abnormal).abs().mean() - score(critic, generated).mean()

    def critic_loss(self, network: nn.Module, inputs: Inputs) -> torch.Tensor:
        healthy, abnormal = signed(inputs["healthy"]), signed(inputs["abnormal"])
        with torch.no_grad():
            generated = self.gan_generator(abnormal).float()
        loss: torch.Tensor = network(healthy, generated, inputs["mix"])
        return loss
