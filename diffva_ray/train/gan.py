"""The generators of methods ``vant-gan`` and ``ant-gan``: healthy or not is all that they are told of an image.

Both are re-implementations of published losses with networks of ours, in pixels, at the model's resolution. Where the
originals update a critic several times a step, ours has a higher learning rate instead (two time scales, Heusel et al.
2017), so that all trainables share the loop's steps.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import nn

from diffva_ray.config.recipe import RecipeError
from diffva_ray.config.stages import AntGanConfig, HealerConfig, VantGanConfig
from diffva_ray.model.gan_generator import GanGenerator
from diffva_ray.progress import LOG
from diffva_ray.storage.store import Store
from diffva_ray.train.adversary import PatchDiscriminator, frozen
from diffva_ray.train.sampling import ImageOrder
from diffva_ray.train.stage import Batch, Stage, StageContext, Trainable

MEASURED = 256  # images of each kind, at most
AT_ONCE = 32


class GanStage(Stage, ABC):
    """What the two have in common: a gan_generator, a critic of healthy images, and images of both kinds."""

    config: HealerConfig
    name: str  # of the gan_generator in the model folder
    gan_generator: Any  # a GanGenerator; diffusers' lazy imports hide what it is
    critic: PatchDiscriminator

    def __init__(self, context: StageContext, config: HealerConfig) -> None:
        super().__init__(context, config)
        healthy = context.bundle.recipe.data.healthy_class
        ill = {image.label: 1 for image in context.images.images if image.label != healthy}
        if healthy in config.classes or not ill:
            what = f"classes holds {healthy}, which is drawn anyway" if ill else "the data hold no abnormal image"
            raise RecipeError(f"stage {config.name}: {what}; it learns to turn abnormal images into {healthy} ones")
        if context.images.size % 2 ** (len(config.block_out_channels) - 1):
            raise RecipeError(
                f"stage {config.name}: {len(config.block_out_channels)} block_out_channels do not halve images of "
                f"{context.images.size} pixels evenly; give fewer"
            )
        self.healthy = ImageOrder(context.images.images, {healthy: 1}, context.seed)
        self.ill = ImageOrder(context.images.images, config.classes or ill, context.seed)
        torch.manual_seed(context.seed)

    def _healer(self, mode: Literal["map", "image"]) -> Any:
        config = self.config
        try:
            return GanGenerator(mode, config.block_out_channels, config.norm_num_groups)
        except ValueError as error:
            raise RecipeError(f"stage {config.name}: {error}") from None

    def _take_part(self, modules: dict[str, nn.Module], generator: nn.Module, critic: nn.Module) -> None:
        """``modules`` are kept in checkpoints, the gan_generator in the model as well."""
        self.modules = {
            self.name: self.gan_generator,
            **{f"{self.name}-{name}": part for name, part in modules.items()},
        }
        self.context.bundle.extras[self.name] = self.gan_generator  # a resumed training may begin after this stage
        rate = self.config.learning_rate * self.config.critic_rate
        self.trainables = [
            Trainable("generator", generator, self.loss),
            Trainable("critic", critic, self.critic_loss, learning_rate=rate),
        ]

    def begin(self, device: torch.device, first: bool, wait: object) -> None:
        for trainable in self.trainables:  # each plays against the other's weights
            trainable.network.to(device).requires_grad_(True)

    def images(self, batch: Batch, network: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """As many healthy as abnormal images [n, 1, H, W] in [-1, 1]."""
        device = next(network.parameters()).device
        healthy, ill = (
            self._pixels([order[position] for position in batch.positions()], device)
            for order in (self.healthy, self.ill)
        )
        return healthy, ill

    def _pixels(self, indices: list[int], device: torch.device) -> torch.Tensor:
        return self.context.images.batch(indices)[:, None].to(device) * 2 - 1

    @abstractmethod
    def loss(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        """The generator's."""

    @abstractmethod
    def critic_loss(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        """The critic's, with the generator as it is."""

    def export(self, store: Store) -> None:
        """Say how far it came, and write it into the gan_generator's ``config.json``."""
        found = self._measure()
        self.gan_generator.register_to_config(measured=found)
        LOG.log(
            logging.INFO if found["converged"] else logging.WARNING,
            "stage %s %s: to its critic generated images are %.3f from healthy ones, abnormal images %.3f; it changes "
            "abnormal images by %.4f, healthy ones by %.4f",
            self.config.name, "converged" if found["converged"] else "DID NOT CONVERGE",
            *(found[key] for key in ("gap_generated", "gap_abnormal", "change_abnormal", "change_healthy")),
        )  # fmt: skip

    @torch.no_grad()
    def _measure(self) -> dict[str, float]:
        """Measurements on training images: how far apart the critic scores them, and the mean change of a pixel (grey
        levels of 1). Converged is a gan_generator that leaves less than half of the distance between abnormal images
        and healthy ones."""
        device = next(self.critic.parameters()).device
        gaps: dict[str, list[torch.Tensor]] = {"healthy": [], "abnormal": [], "generated": []}
        changes: dict[str, list[torch.Tensor]] = {"healthy": [], "abnormal": []}
        for kind, order in (("healthy", self.healthy), ("abnormal", self.ill)):
            members = sorted(index for images in order.members.values() for index in images)
            members = members[:: -(-len(members) // MEASURED)]
            for start in range(0, len(members), AT_ONCE):
                images = self._pixels(members[start : start + AT_ONCE], device)
                generated = self.gan_generator(images)
                gaps[kind].append(score(self.critic, images))
                changes[kind].append((generated - images).abs().mean(dim=(1, 2, 3)) / 2)
                if kind == "abnormal":
                    gaps["generated"].append(score(self.critic, generated))
        means = {kind: float(torch.cat(values).mean()) for kind, values in gaps.items()}
        found = {f"gap_{kind}": means["healthy"] - means[kind] for kind in ("abnormal", "generated")}
        found |= {f"change_{kind}": float(torch.cat(values).mean()) for kind, values in changes.items()}
        converged = abs(found["gap_generated"]) < 0.5 * found["gap_abnormal"]
        return {**{key: round(value, 6) for key, value in found.items()}, "converged": converged}


def logits(critic: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits [n, 1, h, w] of overlapping patches of grey images [n, 1, H, W] in [-1, 1]."""
    return critic(images.float().expand(-1, 3, -1, -1))[0]


def score(critic: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """D(x) [n]: the mean over patches."""
    return logits(critic, images).mean(dim=(1, 2, 3))


class VantGanStage(GanStage):
    """Visual feature attribution by a Wasserstein GAN (Baumgartner et al. 2018, section 3): a map M such that x + M(x)
    cannot be told from healthy images, and no larger than it need be,

        min_M max_D  E_healthy[D(x)] - E_ill[D(x + M(x))] + map_weight * |M(x)|_1  (the mean over pixels),

    D held to Lipschitz 1 by a gradient penalty (Gulrajani et al. 2017, equation 3). Theirs are a 3D U-Net and a C3D
    critic with five updates a step."""

    config: VantGanConfig
    name = "vant_gan"

    def __init__(self, context: StageContext, config: VantGanConfig) -> None:
        super().__init__(context, config)
        self.gan_generator = self._healer("map")
        self.critic = PatchDiscriminator(config.critic_channels)
        network = WassersteinCritic(self.critic, config.penalty_weight)
        self._take_part({"critic": self.critic}, self.gan_generator, network)

    def loss(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        _, ill = self.images(batch, network)
        generated = network(ill)
        with frozen(self.critic) as critic, torch.autocast(generated.device.type, enabled=False):
            return self.config.map_weight * (generated - ill).abs().mean() - score(critic, generated).mean()

    def critic_loss(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        healthy, ill = self.images(batch, network)
        with torch.no_grad():
            generated = self.gan_generator(ill).float()
        return network(healthy, generated, batch.uniform(1, 1, 1).to(generated.device))


class WassersteinCritic(nn.Module):
    """The critic's whole loss behind one forward: so several workers exchange the gradients of all its parts at once,
    and the penalty's own gradient is taken of the network itself, within each worker."""

    def __init__(self, critic: PatchDiscriminator, penalty_weight: float) -> None:
        super().__init__()
        self.critic, self.penalty_weight = critic, penalty_weight

    @torch.compiler.disable  # has no second derivatives
    def forward(self, healthy: torch.Tensor, generated: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
        """E[D(generated)] - E[D(healthy)] + penalty_weight * E[(|grad D(between)| - 1)^2], in float32."""
        with torch.autocast(healthy.device.type, enabled=False):
            between = (mix * healthy + (1 - mix) * generated).requires_grad_()
            real, fake, middle = score(self.critic, torch.cat([healthy, generated, between])).chunk(3)
            if not torch.is_grad_enabled():
                raise ValueError("the gradient penalty needs gradients")
            (gradient,) = torch.autograd.grad(middle.sum(), between, create_graph=True)
            penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
            return fake.mean() - real.mean() + self.penalty_weight * penalty


class AntGanStage(GanStage):
    """Abnormal-to-normal translation (Sun et al. 2020): generators both ways, a patch discriminator for each kind of
    image, least-squares adversarial losses (Mao et al. 2017), cycle consistency and identity as in Zhu et al. 2017
    (equations 1 to 3, section 5.2). Theirs is built on that cycle, too; of its own terms we know what its abstract and
    its successors tell, so what is beyond the cycle is not claimed to be theirs."""

    config: AntGanConfig
    name = "ant_gan"

    def __init__(self, context: StageContext, config: AntGanConfig) -> None:
        super().__init__(context, config)
        self.gan_generator, harmer = self._healer("image"), self._healer("image")
        self.critic, other = (PatchDiscriminator(config.critic_channels) for _ in range(2))
        self.cycle = Cycle(self.gan_generator, harmer)
        self.critics = LeastSquaresCritics(self.critic, other)
        modules = {"harmer": harmer, "critic": self.critic, "critic-abnormal": other}
        self._take_part(modules, self.cycle, self.critics)

    def loss(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        healthy, ill = self.images(batch, network)
        generated, harmed, cycled, unchanged = network(healthy, ill)
        with frozen(self.critics), torch.autocast(ill.device.type, enabled=False):
            fooled = square(logits(self.critics.healthy, generated), 1) + square(logits(self.critics.ill, harmed), 1)
        return fooled + self.config.cycle_weight * cycled + self.config.identity_weight * unchanged

    def critic_loss(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        healthy, ill = self.images(batch, network)
        with torch.no_grad():
            generated, harmed = self.cycle.gan_generator(ill), self.cycle.harmer(healthy)
        return network(healthy, generated, ill, harmed)


class Cycle(nn.Module):
    """Both generators behind one forward."""

    def __init__(self, gan_generator: Any, harmer: Any) -> None:
        super().__init__()
        self.gan_generator: Any = gan_generator
        self.harmer: Any = harmer

    def forward(self, healthy: torch.Tensor, ill: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Generated and harmed images, and the L1 losses of the cycles and of images that are already what is
        wanted."""
        generated, same_healthy = self.gan_generator(torch.cat([ill, healthy])).chunk(2)
        harmed, same_ill = self.harmer(torch.cat([healthy, ill])).chunk(2)
        cycled = (self.harmer(generated) - ill).abs().mean() + (self.gan_generator(harmed) - healthy).abs().mean()
        return generated, harmed, cycled, (same_healthy - healthy).abs().mean() + (same_ill - ill).abs().mean()


class LeastSquaresCritics(nn.Module):
    """The discriminators of healthy and of abnormal images; forward is the loss of both."""

    def __init__(self, healthy: PatchDiscriminator, ill: PatchDiscriminator) -> None:
        super().__init__()
        self.healthy, self.ill = healthy, ill

    def forward(
        self, healthy: torch.Tensor, generated: torch.Tensor, ill: torch.Tensor, harmed: torch.Tensor
    ) -> torch.Tensor:
        real, fake = logits(self.healthy, torch.cat([healthy, generated])).chunk(2)
        loss = square(real, 1) + square(fake, 0)
        real, fake = logits(self.ill, torch.cat([ill, harmed])).chunk(2)
        return 0.5 * (loss + square(real, 1) + square(fake, 0))


def square(logits: torch.Tensor, target: float) -> torch.Tensor:
    return (logits - target).square().mean()
