"""ANT-GAN (Sun et al. 2020, "An adversarial learning approach to medical image synthesis for lesion detection"):
abnormal-to-normal translation. Generators in both directions, a patch discriminator for each kind of image,
least-squares adversarial losses (Mao et al. 2017), cycle consistency and identity loss as in Zhu et al. 2017,

    loss = (D_h(G(x_a)) - 1)^2 + (D_a(F(x_h)) - 1)^2 + cycle_weight * (L1 of both cycles)
           + identity_weight * (|G(x_h) - x_h|_1 + |F(x_a) - x_a|_1).

Sun et al. build on the same cycle, with residual blocks and PatchGAN; their further terms, which keep the lesion's
details on the way back, are known to us only from the abstract and from later papers and are missing. Networks are
ours.
"""

from __future__ import annotations

import torch
from torch import nn

from diffva_ray.config.reference_stages import AntGanConfig
from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion
from diffva_ray.references.gan import Cycle, GanStage, logits, one_pass, signed, square
from diffva_ray.train.adversary import PatchDiscriminator, frozen
from diffva_ray.train.stage import Inputs, StageContext


def generate(model: LatentDiffusion, request: Edit) -> Generated:
    """Apply the network ``ant_gan``. Raises UnusableModel without it."""
    return one_pass(model, request, "ant_gan")


class AntGanStage(GanStage):
    """Trains the generators of both directions and their discriminators."""

    config: AntGanConfig
    name = "ant_gan"

    def __init__(self, context: StageContext, config: AntGanConfig) -> None:
        super().__init__(context, config)
        self.gan_generator, inverse = self.make_generator("image"), self.make_generator("image")
        self.critic, abnormal_critic = (PatchDiscriminator(config.critic_channels) for _ in range(2))
        self.cycle = Cycle(self.gan_generator, inverse)
        self.critics = LeastSquaresCritics(self.critic, abnormal_critic)
        modules = {"harmer": inverse, "critic": self.critic, "critic-abnormal": abnormal_critic}  # file names
        self.register(modules, self.cycle, self.critics)

    def loss(self, network: nn.Module, inputs: Inputs) -> torch.Tensor:
        healthy, abnormal = signed(inputs["healthy"]), signed(inputs["abnormal"])
        outputs: tuple[torch.Tensor, ...] = network(healthy, abnormal)
        generated, worsened, cycle_loss, identity_loss = outputs
        with frozen(self.critics), torch.autocast(abnormal.device.type, enabled=False):
            adversarial = square(logits(self.critics.healthy, generated), 1)
            adversarial = adversarial + square(logits(self.critics.abnormal, worsened), 1)
        return adversarial + self.config.cycle_weight * cycle_loss + self.config.identity_weight * identity_loss

    def critic_loss(self, network: nn.Module, inputs: Inputs) -> torch.Tensor:
        healthy, abnormal = signed(inputs["healthy"]), signed(inputs["abnormal"])
        with torch.no_grad():
            generated, worsened = self.cycle.gan_generator(abnormal), self.cycle.inverse(healthy)
        loss: torch.Tensor = network(healthy, generated, abnormal, worsened)
        return loss


class LeastSquaresCritics(nn.Module):
    """The discriminators of healthy and of abnormal images; forward returns the loss of both."""

    def __init__(self, healthy: PatchDiscriminator, abnormal: PatchDiscriminator) -> None:
        super().__init__()
        self.healthy, self.abnormal = healthy, abnormal

    def forward(
        self, healthy: torch.Tensor, generated: torch.Tensor, abnormal: torch.Tensor, worsened: torch.Tensor
    ) -> torch.Tensor:
        real, fake = logits(self.healthy, torch.cat([healthy, generated])).chunk(2)
        loss = square(real, 1) + square(fake, 0)
        real, fake = logits(self.abnormal, torch.cat([abnormal, worsened])).chunk(2)
        return 0.5 * (loss + square(real, 1) + square(fake, 0))
