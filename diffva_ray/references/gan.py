"""What the GANs share: images of both kinds, the critics' losses, and the measurement of a generator.

They are trained on pixels at the model's resolution and on the labels healthy and abnormal alone. Where the originals
update a critic several times in each step, our critic has a higher learning rate instead (two time scales, Heusel et
al. 2017), so that all trainables share the loop's steps. The networks are ours: a U-Net of diffusers' blocks
(``model/gan_generator.py``) and the patch discriminator of ``train/adversary.py``.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import nn

from diffva_ray.config.recipe import RecipeError
from diffva_ray.config.reference_stages import GanConfig
from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion
from diffva_ray.model.gan_generator import GanGenerator
from diffva_ray.progress import LOG
from diffva_ray.references.training import REMOVED, ReferenceStage
from diffva_ray.storage.store import Store
from diffva_ray.train.adversary import PatchDiscriminator
from diffva_ray.train.sampling import ImageOrder, grey
from diffva_ray.train.stage import Batch, Inputs, StageContext, Trainable, Worker

MAX_MEASURED = 256  # images of each kind, for the measurements after training
MEASURED_IN_A_POINT = 64  # of each kind, for a point of the training curve
BATCH_SIZE = 32  # of those measurements


class GanStage(ReferenceStage, ABC):
    """Base of the stages: a generator, a critic of healthy images, and images of both kinds."""

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

    def make_generator(self, mode: Literal["map", "image"]) -> Any:
        config = self.config
        try:
            return GanGenerator(mode, config.block_out_channels, config.norm_num_groups)
        except ValueError as error:
            raise RecipeError(f"stage {config.name}: {error}") from None

    def register(self, modules: dict[str, nn.Module], generator: nn.Module, critic: nn.Module | None) -> None:
        """Declare what is trained, and what is saved: the generator in the model, ``modules`` only in checkpoints."""
        self.modules = {
            self.name: self.gan_generator,
            **{f"{self.name}-{name}": module for name, module in modules.items()},
        }
        self.context.bundle.extras[self.name] = self.gan_generator  # a resumed training may start after this stage
        rate = self.config.learning_rate * self.config.critic_rate
        self.trainables = [Trainable("generator", generator, self.inputs, self.loss)]
        if critic is not None:
            self.trainables += [Trainable("critic", critic, self.inputs, self.critic_loss, learning_rate=rate)]

    def begin(self, worker: Worker) -> None:
        super().begin(worker)
        for trainable in self.trainables:  # each loss also reads the other network
            trainable.network.to(worker.device).requires_grad_(True)

    def inputs(self, batch: Batch) -> Inputs:
        """Return a share's healthy and abnormal images, uint8 [n, H, W] each, and a number for each in [0, 1)."""
        healthy, abnormal = (
            self.context.images.stack([order[position] for position in batch.positions()])
            for order in (self.healthy, self.abnormal)
        )
        return {"healthy": healthy, "abnormal": abnormal, "mix": batch.random.uniform(1, 1, 1)}

    @abstractmethod
    def loss(self, network: nn.Module, inputs: Inputs) -> torch.Tensor:
        """Loss of the generator."""

    def critic_loss(self, network: nn.Module, inputs: Inputs) -> torch.Tensor:
        """Loss of the critic, if there is one, with the generator fixed."""
        raise NotImplementedError

    def counterfactual(self, images: torch.Tensor) -> torch.Tensor:
        """The healthy counterfactuals of images [n, 1, H, W] in [-1, 1]."""
        made: torch.Tensor = self.gan_generator(images)
        return made

    def rate(self, images: torch.Tensor) -> torch.Tensor:
        """How healthy images are [n], by the network that the generator is trained against."""
        return score(self.critic, images)

    def further(self, images: torch.Tensor) -> dict[str, float]:
        """Further measurements after training, on abnormal images [n, 1, H, W] in [-1, 1]."""
        return {}

    def point(self) -> dict[str, float]:
        measured = self.measured(MEASURED_IN_A_POINT)
        gap = measured["gap_abnormal"]  # not positive while the critic cannot tell: nothing is removed yet
        return {
            "removed": max(-10.0, min(10.0, 1 - measured["gap_generated"] / gap)) if gap > 0 else 0.0,
            "change": measured["change_abnormal"],
            "change_healthy": measured["change_healthy"],
        }

    def export(self, store: Store) -> None:
        """Measure the generator, log it, and write it into its ``config.json``. It has learnt its task if generated
        images have less than REMOVED of the abnormal images' distance to healthy ones."""
        measured: dict[str, Any] = self.measured(MAX_MEASURED)
        good = abs(measured["gap_generated"]) < REMOVED * measured["gap_abnormal"]
        self.gan_generator.register_to_config(measured={**measured, "converged": good})
        LOG.log(
            logging.INFO if good else logging.WARNING,
            "stage %s %s: critic score distance to healthy images: generated %.3f, abnormal %.3f; mean pixel change: "
            "abnormal images %.4f, healthy images %.4f",
            self.config.name, "converged" if good else "DID NOT CONVERGE",
            *(measured[key] for key in ("gap_generated", "gap_abnormal", "change_abnormal", "change_healthy")),
        )  # fmt: skip

    @torch.no_grad()
    def measured(self, count: int) -> dict[str, float]:
        """Measure on ``count`` training images of each kind: distances between the mean ratings, and the mean
        change of a pixel (grey values in [0, 1])."""
        device = next(self.gan_generator.parameters()).device
        gaps: dict[str, list[torch.Tensor]] = {"healthy": [], "abnormal": [], "generated": []}
        changes: dict[str, list[torch.Tensor]] = {"healthy": [], "abnormal": []}
        for kind, order in (("healthy", self.healthy), ("abnormal", self.abnormal)):
            # Take every n-th image, so that all classes are measured.
            members = sorted(index for images in order.members.values() for index in images)
            members = members[:: -(-len(members) // count)]
            for start in range(0, len(members), BATCH_SIZE):
                images = signed(self.context.images.stack(members[start : start + BATCH_SIZE]).to(device))
                generated = self.counterfactual(images)
                gaps[kind].append(self.rate(images))
                changes[kind].append((generated - images).abs().mean(dim=(1, 2, 3)) / 2)
                if kind == "abnormal":
                    gaps["generated"].append(self.rate(generated))
                    last = images

        # Summarize.
        means = {kind: float(torch.cat(values).mean()) for kind, values in gaps.items()}
        measured = {f"gap_{kind}": means["healthy"] - means[kind] for kind in ("abnormal", "generated")}
        measured |= {f"change_{kind}": float(torch.cat(values).mean()) for kind, values in changes.items()}
        return {key: round(value, 6) for key, value in {**measured, **self.further(last)}.items()}


def one_pass(model: LatentDiffusion, request: Edit, network: str) -> Generated:
    """Apply a generator of the model; prompt, noise and steps have no effect. Raises UnusableModel without it."""
    dtype = next(model.unet.parameters()).dtype
    gan_generator = model.bundle.extra(network).to(request.images.device, dtype).eval().requires_grad_(False)
    return Generated(gan_generator.generate(request.images), request.images)


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


def square(logits: torch.Tensor, target: float) -> torch.Tensor:
    """Least-squares adversarial loss (Mao et al. 2017)."""
    return (logits - target).square().mean()


class WassersteinCritic(nn.Module):
    """A critic's whole loss behind one forward: DDP then exchanges the gradients of all parts at once, and each worker
    computes the penalty's inner gradient on the unwrapped network."""

    def __init__(self, critic: PatchDiscriminator, penalty_weight: float) -> None:
        super().__init__()
        self.critic, self.penalty_weight = critic, penalty_weight

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the compiler has no second derivatives
    def forward(self, real: torch.Tensor, generated: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
        """Return E[D(generated)] - E[D(real)] + penalty_weight * E[(|grad D(between)| - 1)^2], in float32 (Gulrajani et
        al. 2017, equation 3)."""
        with torch.autocast(real.device.type, enabled=False):
            between = (mix * real + (1 - mix) * generated).requires_grad_()
            right, fake, middle = score(self.critic, torch.cat([real, generated, between])).chunk(3)
            if not torch.is_grad_enabled():
                raise ValueError("call the critic's loss with gradients enabled; the gradient penalty needs them")
            (gradient,) = torch.autograd.grad(middle.sum(), between, create_graph=True)
            penalty: torch.Tensor = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
            return fake.mean() - right.mean() + self.penalty_weight * penalty


class Cycle(nn.Module):
    """The generators of both directions behind one forward."""

    def __init__(self, gan_generator: Any, inverse: Any) -> None:
        super().__init__()
        self.gan_generator: Any = gan_generator  # abnormal to healthy
        self.inverse: Any = inverse  # healthy to abnormal

    def forward(self, healthy: torch.Tensor, abnormal: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return both generators' images, the L1 loss of the cycles, and the L1 loss of images that should stay as they
        are (Zhu et al. 2017, equation 2 and section 5.2)."""
        generated, same_healthy = self.gan_generator(torch.cat([abnormal, healthy])).chunk(2)
        worsened, same_abnormal = self.inverse(torch.cat([healthy, abnormal])).chunk(2)
        cycle_loss = (self.inverse(generated) - abnormal).abs().mean()
        cycle_loss = cycle_loss + (self.gan_generator(worsened) - healthy).abs().mean()
        identity_loss = (same_healthy - healthy).abs().mean() + (same_abnormal - abnormal).abs().mean()
        return generated, worsened, cycle_loss, identity_loss
