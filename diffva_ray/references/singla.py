"""Singla et al. 2023, "Explaining the black-box smoothly - a counterfactual approach" (progressive exaggeration, method
``singla``): a conditional GAN makes an image for every wanted posterior c of a classifier f, from 0 to 1,

    loss = - D(G(x, c), c) + classifier_weight * CE(f(G(x, c)), c)
           + cycle_weight * (|x - G(x, f(x))|_1 + |x - G(G(x, c), f(x))|_1),

and D has the hinge loss of real images at their own posterior f(x). The healthy counterfactual is G(x, 0);
``generate.references.posterior`` asks for another value. After training the consistency |f(G(x, c)) - c| is measured.

Differences: c is continuous and enters generator and critic as a constant channel, instead of ten bins in conditional
normalisation and a projection; our networks; no loss on segmented lungs and devices; weights are ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from diffva_ray.config.reference_stages import SinglaConfig
from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion
from diffva_ray.model.gan_generator import GanGenerator
from diffva_ray.references.gan import signed
from diffva_ray.references.image_classifier import ExplainerStage
from diffva_ray.train.adversary import PatchDiscriminator, frozen, hinge_loss
from diffva_ray.train.stage import Batch, Inputs, StageContext

WANTED = (0.0, 0.25, 0.5, 0.75, 1.0)  # posteriors at which consistency is measured


def generate(model: LatentDiffusion, request: Edit) -> Generated:
    """The image of the wanted posterior. Raises UnusableModel without the network ``singla``."""
    dtype = next(model.unet.parameters()).dtype
    generator = model.bundle.extra("singla").to(request.images.device, dtype).eval().requires_grad_(False)
    x = request.images[:, None].to(dtype) * 2 - 1
    wanted = torch.full_like(x[:, 0, 0, 0], request.config.references.posterior)
    made = generator(with_posterior(x, wanted))[:, 0].float() / 2 + 0.5
    return Generated(made.clamp(0, 1), request.images)


def with_posterior(images: torch.Tensor, posterior: torch.Tensor) -> torch.Tensor:
    """Images [n, k, H, W] with a constant channel of the posteriors [n], from -1 to 1."""
    plane = (posterior * 2 - 1)[:, None, None, None].to(images) * torch.ones_like(images[:, :1])
    return torch.cat([images, plane], dim=1)


class SinglaStage(ExplainerStage):
    """Trains the conditional generator and its critic."""

    config: SinglaConfig
    name = "singla"

    def __init__(self, context: StageContext, config: SinglaConfig) -> None:
        super().__init__(context, config)
        self.gan_generator: Any = GanGenerator(
            "image", config.block_out_channels, config.norm_num_groups, in_channels=2
        )
        self.critic = PatchDiscriminator(config.critic_channels)
        self.register({"critic": self.critic}, Exaggeration(self.gan_generator), Conditional(self.critic))

    def counterfactual(self, images: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.gan_generator(with_posterior(images, torch.zeros_like(images[:, 0, 0, 0])))
        return made

    def inputs(self, batch: Batch) -> Inputs:
        return {**super().inputs(batch), "wanted": batch.random.uniform(2)}

    def loss(self, network: nn.Module, inputs: Inputs) -> torch.Tensor:
        x, wanted, own = self._posteriors(inputs)
        made, same, back = network(x, wanted, own)
        with frozen(self.critic), torch.autocast(x.device.type, enabled=False):
            adversarial = -conditioned(self.critic, made, wanted).mean()
            consistency = functional.binary_cross_entropy_with_logits(self.log_odds(made), wanted)
        cycle: torch.Tensor = (x - same).abs().mean() + (x - back).abs().mean()
        return adversarial + self.config.classifier_weight * consistency + self.config.cycle_weight * cycle

    def critic_loss(self, network: nn.Module, inputs: Inputs) -> torch.Tensor:
        x, wanted, own = self._posteriors(inputs)
        with torch.no_grad():
            made = self.gan_generator(with_posterior(x, wanted)).float()
        patches: torch.Tensor = network(torch.cat([x, made]), torch.cat([own, wanted]))
        real, fake = patches.chunk(2)
        return hinge_loss(real, fake)

    def _posteriors(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images of both kinds, wanted posteriors and the classifier's."""
        x = torch.cat([signed(inputs["healthy"]), signed(inputs["abnormal"])])
        with torch.no_grad():
            own = self.log_odds(x).sigmoid()
        return x, inputs["wanted"].T.reshape(-1), own

    def further(self, images: torch.Tensor) -> dict[str, float]:
        gaps = []
        for wanted in WANTED:
            made = self.gan_generator(with_posterior(images, torch.full_like(images[:, 0, 0, 0], wanted)))
            gaps.append((self.log_odds(made).sigmoid() - wanted).abs().mean())
        return {"consistency_error": float(torch.stack(gaps).mean())}


class Exaggeration(nn.Module):
    """The generator's three uses behind one forward."""

    def __init__(self, generator: Any) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, x: torch.Tensor, wanted: torch.Tensor, own: torch.Tensor) -> tuple[torch.Tensor, ...]:
        made = self.generator(with_posterior(x, wanted))
        return made, self.generator(with_posterior(x, own)), self.generator(with_posterior(made, own))


def conditioned(critic: nn.Module, images: torch.Tensor, posterior: torch.Tensor) -> torch.Tensor:
    """Logits of patches of images [n, 1, H, W] at posteriors [n]."""
    patches: torch.Tensor = critic(with_posterior(images.float().expand(-1, 2, -1, -1), posterior))[0]
    return patches


class Conditional(nn.Module):
    """The critic of images at posteriors."""

    def __init__(self, critic: PatchDiscriminator) -> None:
        super().__init__()
        self.critic = critic

    def forward(self, images: torch.Tensor, posterior: torch.Tensor) -> torch.Tensor:
        with torch.autocast(images.device.type, enabled=False):
            return conditioned(self.critic, images, posterior)
