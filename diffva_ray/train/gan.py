"""Stages ``vant-gan`` and ``ant-gan``: train image-to-image generators on the labels healthy and abnormal alone.

Both re-implement published losses with our own networks, on pixels at the model's resolution. Where the originals
update a critic several times in each step, our critic has a higher learning rate instead (two time scales, Heusel et
al. 2017), so that all trainables share the loop's steps.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import nn

from diffva_ray.config.recipe import RecipeError
from diffva_ray.config.stages import AntGanConfig, GanConfig, VantGanConfig
from diffva_ray.model.gan_generator import GanGenerator
from diffva_ray.progress import LOG
from diffva_ray.storage.store import Store
from diffva_ray.train.adversary import PatchDiscriminator, frozen
from diffva_ray.train.sampling import ImageOrder, grey
from diffva_ray.train.stage import Batch, Inputs, Stage, StageContext, Trainable, Worker

MAX_MEASURED = 256  # images of each kind, for the measurements after training
BATCH_SIZE = 32  # of those measurements


class GanStage(Stage, ABC):
    """Base of both stages: a generator, a critic of healthy images, and images of both kinds."""

    config: GanConfig
    name: str  # of the generator in the model folder
    gan_generator: Any  # a GanGenerator, whose type diffusers' lazy imports hide
    critic: PatchDiscriminator  # of healthy images

    def __init__(self, context: StageContext, config: GanConfig) -> None:
        super().__init__(context, config)
        healthy = context.bundle.recipe.data.healthy_class
        abnormal = {image.label: 1 for image in context.images.images if image.label != healthy}
        if not abnormal:
            raise RecipeError(f"stage {config.name}: the data hold no abnormal image, which the stage needs")
        if healthy in config.classes:
            raise RecipeError(f"stage {config.name}: remove {healthy} from classes; the stage always uses this class")
        if context.images.size % 2 ** (len(config.block_out_channels) - 1):
            raise RecipeError(
                f"stage {config.name}: {len(config.block_out_channels)} block_out_channels do not halve images of "
                f"{context.images.size} pixels evenly; give fewer"
            )
        self.healthy = ImageOrder(context.images.images, {healthy: 1}, context.seed)
        self.abnormal = ImageOrder(context.images.images, config.classes or abnormal, context.seed)
        torch.manual_seed(context.seed)

    def _make_generator(self, mode: Literal["map", "image"]) -> Any:
        config = self.config
        try:
            return GanGenerator(mode, config.block_out_channels, config.norm_num_groups)
        except ValueError as error:
            raise RecipeError(f"stage {config.name}: {error}") from None

    def _register(self, modules: dict[str, nn.Module], generator: nn.Module, critic: nn.Module) -> None:
        """Declare what is trained, and what is saved: the generator in the model, ``modules`` only in checkpoints."""
        self.modules = {
            self.name: self.gan_generator,
            **{f"{self.name}-{name}": module for name, module in modules.items()},
        }
        self.context.bundle.extras[self.name] = self.gan_generator  # a resumed training may start after this stage
        rate = self.config.learning_rate * self.config.critic_rate
        self.trainables = [
            Trainable("generator", generator, self.inputs, self.loss),
            Trainable("critic", critic, self.inputs, self.critic_loss, learning_rate=rate),
        ]

    def begin(self, worker: Worker) -> None:
        for trainable in self.trainables:  # each loss also reads the other network
            trainable.network.to(worker.device).requires_grad_(True)

    def inputs(self, batch: Batch) -> Inputs:
        """Return a share's healthy and abnormal images, uint8 [n, H, W] each, and a number for each in [0, 1)."""
        healthy, abnormal = (
            self.context.images.stack([order[position] for position in batch.positions()])
            for order in (self.healthy, self.abnormal)
        )
        return {"healthy": healthy, "abnormal": abnormal, "mix": batch.random.uniform(1, 1, 1)}

    def _pixels(self, indices: list[int], device: torch.device) -> torch.Tensor:
        return signed(self.context.images.stack(indices).to(device))

    @abstractmethod
    def loss(self, network: nn.Module, inputs: Inputs) -> torch.Tensor:
        """Loss of the generator."""

    @abstractmethod
    def critic_loss(self, network: nn.Module, inputs: Inputs) -> torch.Tensor:
        """Loss of the critic, with the generator fixed."""

    def export(self, store: Store) -> None:
        """Measure whether the training converged, log it, and write it into the generator's ``config.json``."""
        measured = self._measure()
        self.gan_generator.register_to_config(measured=measured)
        LOG.log(
            logging.INFO if measured["converged"] else logging.WARNING,
            "stage %s %s: critic score distance to healthy images: generated %.3f, abnormal %.3f; mean pixel change: "
            "abnormal images %.4f, healthy images %.4f",
            self.config.name, "converged" if measured["converged"] else "DID NOT CONVERGE",
            *(measured[key] for key in ("gap_generated", "gap_abnormal", "change_abnormal", "change_healthy")),
        )  # fmt: skip

    @torch.no_grad()
    def _measure(self) -> dict[str, float]:
        """Measure on training images: distances between the critic's mean scores, and the mean change of a pixel (grey
        values in [0, 1]). A generator has converged if generated images have less than half of the abnormal images'
        distance to healthy ones."""
        device = next(self.critic.parameters()).device
        gaps: dict[str, list[torch.Tensor]] = {"healthy": [], "abnormal": [], "generated": []}
        changes: dict[str, list[torch.Tensor]] = {"healthy": [], "abnormal": []}
        for kind, order in (("healthy", self.healthy), ("abnormal", self.abnormal)):
            # Take every n-th image, so that all classes are measured.
            members = sorted(index for images in order.members.values() for index in images)
            members = members[:: -(-len(members) // MAX_MEASURED)]
            for start in range(0, len(members), BATCH_SIZE):
                images = self._pixels(members[start : start + BATCH_SIZE], device)
                generated = self.gan_generator(images)
                gaps[kind].append(score(self.critic, images))
                changes[kind].append((generated - images).abs().mean(dim=(1, 2, 3)) / 2)
                if kind == "abnormal":
                    gaps["generated"].append(score(self.critic, generated))

        # Summarize.
        means = {kind: float(torch.cat(values).mean()) for kind, values in gaps.items()}
        measured = {f"gap_{kind}": means["healthy"] - means[kind] for kind in ("abnormal", "generated")}
        measured |= {f"change_{kind}": float(torch.cat(values).mean()) for kind, values in changes.items()}
        converged = abs(measured["gap_generated"]) < 0.5 * measured["gap_abnormal"]
        return {**{key: round(value, 6) for key, value in measured.items()}, "converged": converged}


def signed(pixels: torch.Tensor) -> torch.Tensor:
    """Convert uint8 images [n, H, W] to [n, 1, H, W] in [-1, 1]."""
    return grey(pixels)[:, None] * 2 - 1


def logits(critic: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return logits [n, 1, h, w] of overlapping patches of grey images [n, 1, H, W] in [-1, 1]."""
    patches: torch.Tensor = critic(images.float().expand(-1, 3, -1, -1))[0]
    return patches


def score(critic: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return D(x) [n], the mean of the logits over patches."""
    return logits(critic, images).mean(dim=(1, 2, 3))


class VantGanStage(GanStage):
    """Visual feature attribution by a Wasserstein GAN (Baumgartner et al. 2018, section 3): learns the smallest map
    M such that a critic cannot distinguish x + M(x) from healthy images,

        min_M max_D  E_healthy[D(x)] - E_abnormal[D(x + M(x))] + map_weight * |M(x)|_1  (mean over pixels),

    where a gradient penalty keeps D Lipschitz 1 (Gulrajani et al. 2017, equation 3). The original uses a 3D U-Net and a
    C3D critic with five updates in each step."""

    config: VantGanConfig
    name = "vant_gan"

    def __init__(self, context: StageContext, config: VantGanConfig) -> None:
        super().__init__(context, config)
        self.gan_generator = self._make_generator("map")
        self.critic = PatchDiscriminator(config.critic_channels)
        network = WassersteinCritic(self.critic, config.penalty_weight)
        self._register({"critic": self.critic}, self.gan_generator, network)

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


class WassersteinCritic(nn.Module):
    """The critic's whole loss behind one forward: DDP then exchanges the gradients of all parts at once, and each
    worker computes the penalty's inner gradient on the unwrapped network."""

    def __init__(self, critic: PatchDiscriminator, penalty_weight: float) -> None:
        super().__init__()
        self.critic, self.penalty_weight = critic, penalty_weight

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the compiler has no second derivatives
    def forward(self, healthy: torch.Tensor, generated: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
        """Return E[D(generated)] - E[D(healthy)] + penalty_weight * E[(|grad D(between)| - 1)^2], in float32."""
        with torch.autocast(healthy.device.type, enabled=False):
            between = (mix * healthy + (1 - mix) * generated).requires_grad_()
            real, fake, middle = score(self.critic, torch.cat([healthy, generated, between])).chunk(3)
            if not torch.is_grad_enabled():
                raise ValueError("call the critic's loss with gradients enabled; the gradient penalty needs them")
            (gradient,) = torch.autograd.grad(middle.sum(), between, create_graph=True)
            penalty: torch.Tensor = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
            return fake.mean() - real.mean() + self.penalty_weight * penalty


class AntGanStage(GanStage):
    """Abnormal-to-normal translation (Sun et al. 2020): generators in both directions, a patch discriminator for each
    kind of image, least-squares adversarial losses (Mao et al. 2017), cycle consistency and identity loss as in Zhu et
    al. 2017 (equations 1 to 3, section 5.2). Sun et al. build on the same cycle; their further terms are known to us
    only from the abstract and from later papers, so this stage does not claim to implement them."""

    config: AntGanConfig
    name = "ant_gan"

    def __init__(self, context: StageContext, config: AntGanConfig) -> None:
        super().__init__(context, config)
        self.gan_generator, inverse = self._make_generator("image"), self._make_generator("image")
        self.critic, abnormal_critic = (PatchDiscriminator(config.critic_channels) for _ in range(2))
        self.cycle = Cycle(self.gan_generator, inverse)
        self.critics = LeastSquaresCritics(self.critic, abnormal_critic)
        modules = {"harmer": inverse, "critic": self.critic, "critic-abnormal": abnormal_critic}  # file names
        self._register(modules, self.cycle, self.critics)

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


class Cycle(nn.Module):
    """The generators of both directions behind one forward."""

    def __init__(self, gan_generator: Any, inverse: Any) -> None:
        super().__init__()
        self.gan_generator: Any = gan_generator  # abnormal to healthy
        self.inverse: Any = inverse  # healthy to abnormal

    def forward(self, healthy: torch.Tensor, abnormal: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return both generators' images, the L1 loss of the cycles, and the L1 loss of images that should stay as they
        are."""
        generated, same_healthy = self.gan_generator(torch.cat([abnormal, healthy])).chunk(2)
        worsened, same_abnormal = self.inverse(torch.cat([healthy, abnormal])).chunk(2)
        cycle_loss = (self.inverse(generated) - abnormal).abs().mean()
        cycle_loss = cycle_loss + (self.gan_generator(worsened) - healthy).abs().mean()
        identity_loss = (same_healthy - healthy).abs().mean() + (same_abnormal - abnormal).abs().mean()
        return generated, worsened, cycle_loss, identity_loss


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


def square(logits: torch.Tensor, target: float) -> torch.Tensor:
    return (logits - target).square().mean()
