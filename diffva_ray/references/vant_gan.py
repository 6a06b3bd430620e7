"""VANT-GAN (Zia et al. 2022, "VANT-GAN: adversarial learning for discrepancy-based visual attribution in medical
imaging"), the paper's direct predecessor: a cycle-consistent GAN whose generator makes the discrepancy map M, and the
counterfactual is image plus map (the authors subtract their map; the sign is a convention). The paper says of it that
it "generates VA maps directly from unhealthy images, which can then be used to generate healthy-looking images".

    loss = map_weight |M(x_a)|_1 - D_h(x_a + M(x_a)) - D_a(x_h + M'(x_h)) + cycle_weight * (L1 of both cycles)

The article is not open; what is known to us is its abstract (map, cycle consistency, unpaired images) and what citing
papers say. Ours to choose were therefore: the Wasserstein critics with gradient penalty in both directions and the L1
of the map, both from VA-GAN, and the weights. ``va-gan`` is the same without the cycle, ``ant-gan`` without the map.
"""

from __future__ import annotations

import torch
from torch import nn

from diffva_ray.config.reference_stages import VantGanConfig
from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion
from diffva_ray.references.gan import Cycle, GanStage, WassersteinCritic, one_pass, score, signed
from diffva_ray.train.adversary import PatchDiscriminator, frozen
from diffva_ray.train.stage import Inputs, StageContext


def generate(model: LatentDiffusion, request: Edit) -> Generated:
    """Apply the network ``vant_gan``. Raises UnusableModel without it."""
    return one_pass(model, request, "vant_gan")


class VantGanStage(GanStage):
    """Trains the maps of both directions and their critics."""

    config: VantGanConfig
    name = "vant_gan"

    def __init__(self, context: StageContext, config: VantGanConfig) -> None:
        super().__init__(context, config)
        self.gan_generator, inverse = self.make_generator("map"), self.make_generator("map")
        self.critic, abnormal_critic = (PatchDiscriminator(config.critic_channels) for _ in range(2))
        self.cycle = Cycle(self.gan_generator, inverse)
        self.critics = WassersteinCritics(self.critic, abnormal_critic, config.penalty_weight)
        modules = {"harmer": inverse, "critic": self.critic, "critic-abnormal": abnormal_critic}  # file names
        self.register(modules, self.cycle, self.critics)

    def loss(self, network: nn.Module, inputs: Inputs) -> torch.Tensor:
        healthy, abnormal = signed(inputs["healthy"]), signed(inputs["abnormal"])
        outputs: tuple[torch.Tensor, ...] = network(healthy, abnormal)
        generated, worsened, cycle_loss, _ = outputs
        with frozen(self.critics), torch.autocast(abnormal.device.type, enabled=False):
            adversarial = score(self.critics.healthy.critic, generated).mean()
            adversarial = adversarial + score(self.critics.abnormal.critic, worsened).mean()
            map_loss = (generated - abnormal).abs().mean()
        return self.config.map_weight * map_loss - adversarial + self.config.cycle_weight * cycle_loss

    def critic_loss(self, network: nn.Module, inputs: Inputs) -> torch.Tensor:
        healthy, abnormal = signed(inputs["healthy"]), signed(inputs["abnormal"])
        with torch.no_grad():
            generated, worsened = self.cycle.gan_generator(abnormal), self.cycle.inverse(healthy)
        loss: torch.Tensor = network(healthy, generated.float(), abnormal, worsened.float(), inputs["mix"])
        return loss


class WassersteinCritics(nn.Module):
    """The critics of healthy and of abnormal images; forward returns the loss of both."""

    def __init__(self, healthy: PatchDiscriminator, abnormal: PatchDiscriminator, penalty_weight: float) -> None:
        super().__init__()
        self.healthy = WassersteinCritic(healthy, penalty_weight)
        self.abnormal = WassersteinCritic(abnormal, penalty_weight)

    def forward(
        self,
        healthy: torch.Tensor,
        generated: torch.Tensor,
        abnormal: torch.Tensor,
        worsened: torch.Tensor,
        mix: torch.Tensor,
    ) -> torch.Tensor:
        loss: torch.Tensor = self.healthy(healthy, generated, mix) + self.abnormal(abnormal, worsened, mix)
        return loss
