"""The generators of methods ``vant-gan`` and ``ant-gan``: healthy or not is all that they are told of a film.

Both are re-implementations of published losses with networks of ours, in pixels, at the model's resolution. Where the
originals update a critic several times a step, ours has a higher learning rate instead (two time scales, Heusel et al.
2017), so that all players share the loop's steps.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import nn

from diffva_ray.config.recipe import RecipeError
from diffva_ray.config.stages import AntGanConfig, HealerConfig, VantGanConfig
from diffva_ray.model.gan_generator import Healer
from diffva_ray.progress import LOG
from diffva_ray.storage.store import Store
from diffva_ray.train.adversary import PatchDiscriminator, frozen
from diffva_ray.train.sampling import Draws
from diffva_ray.train.stage import Batch, Player, Setting, Stage

MEASURED = 256  # films of each kind, at most
AT_ONCE = 32


class GanStage(Stage, ABC):
    """What the two have in common: a healer, a critic of healthy films, and films of both kinds."""

    config: HealerConfig
    name: str  # of the healer in the model folder
    healer: Any  # a Healer; diffusers' lazy imports hide what it is
    critic: PatchDiscriminator

    def __init__(self, setting: Setting, config: HealerConfig) -> None:
        super().__init__(setting, config)
        healthy = setting.bundle.recipe.data.healthy_class
        ill = {film.label: 1 for film in setting.films.films if film.label != healthy}
        if healthy in config.classes or not ill:
            what = f"classes holds {healthy}, which is drawn anyway" if ill else "the data hold no abnormal film"
            raise RecipeError(f"stage {config.name}: {what}; it learns to turn abnormal films into {healthy} ones")
        if setting.films.size % 2 ** (len(config.block_out_channels) - 1):
            raise RecipeError(
                f"stage {config.name}: {len(config.block_out_channels)} block_out_channels do not halve films of "
                f"{setting.films.size} pixels evenly; give fewer"
            )
        self.healthy = Draws(setting.films.films, {healthy: 1}, setting.seed)
        self.ill = Draws(setting.films.films, config.classes or ill, setting.seed)
        torch.manual_seed(setting.seed)

    def _healer(self, mode: Literal["map", "image"]) -> Any:
        config = self.config
        try:
            return Healer(mode, config.block_out_channels, config.norm_num_groups)
        except ValueError as error:
            raise RecipeError(f"stage {config.name}: {error}") from None

    def _take_part(self, modules: dict[str, nn.Module], generator: nn.Module, critic: nn.Module) -> None:
        """``modules`` are kept in checkpoints, the healer in the model as well."""
        self.modules = {self.name: self.healer, **{f"{self.name}-{name}": part for name, part in modules.items()}}
        self.setting.bundle.extras[self.name] = self.healer  # a resumed training may begin after this stage
        rate = self.config.learning_rate * self.config.critic_rate
        self.players = [
            Player("generator", generator, self.loss),
            Player("critic", critic, self.critic_loss, learning_rate=rate),
        ]

    def begin(self, device: torch.device, first: bool, wait: object) -> None:
        for player in self.players:  # each plays against the other's weights
            player.network.to(device).requires_grad_(True)

    def films(self, batch: Batch, network: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """As many healthy as abnormal films [n, 1, H, W] in [-1, 1]."""
        device = next(network.parameters()).device
        healthy, ill = (
            self._pixels([draws[position] for position in batch.positions()], device)
            for draws in (self.healthy, self.ill)
        )
        return healthy, ill

    def _pixels(self, indices: list[int], device: torch.device) -> torch.Tensor:
        return self.setting.films.batch(indices)[:, None].to(device) * 2 - 1

    @abstractmethod
    def loss(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        """The generator's."""

    @abstractmethod
    def critic_loss(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        """The critic's, with the generator as it is."""

    def export(self, store: Store) -> None:
        """Say how far it came, and write it into the healer's ``config.json``."""
        found = self._measure()
        self.healer.register_to_config(measured=found)
        LOG.log(
            logging.INFO if found["converged"] else logging.WARNING,
            "stage %s %s: to its critic healed films are %.3f from healthy ones, abnormal films %.3f; it changes "
            "abnormal films by %.4f, healthy ones by %.4f",
            self.config.name, "converged" if found["converged"] else "DID NOT CONVERGE",
            *(found[key] for key in ("gap_healed", "gap_abnormal", "change_abnormal", "change_healthy")),
        )  # fmt: skip

    @torch.no_grad()
    def _measure(self) -> dict[str, float]:
        """Measurements on training films: how far apart the critic scores them, and the mean change of a pixel (grey
        levels of 1). Converged is a healer that leaves less than half of the distance between abnormal films and
        healthy ones."""
        device = next(self.critic.parameters()).device
        gaps: dict[str, list[torch.Tensor]] = {"healthy": [], "abnormal": [], "healed": []}
        changes: dict[str, list[torch.Tensor]] = {"healthy": [], "abnormal": []}
        for kind, draws in (("healthy", self.healthy), ("abnormal", self.ill)):
            members = sorted(index for films in draws.members.values() for index in films)
            members = members[:: -(-len(members) // MEASURED)]
            for start in range(0, len(members), AT_ONCE):
                films = self._pixels(members[start : start + AT_ONCE], device)
                healed = self.healer(films)
                gaps[kind].append(score(self.critic, films))
                changes[kind].append((healed - films).abs().mean(dim=(1, 2, 3)) / 2)
                if kind == "abnormal":
                    gaps["healed"].append(score(self.critic, healed))
        means = {kind: float(torch.cat(values).mean()) for kind, values in gaps.items()}
        found = {f"gap_{kind}": means["healthy"] - means[kind] for kind in ("abnormal", "healed")}
        found |= {f"change_{kind}": float(torch.cat(values).mean()) for kind, values in changes.items()}
        converged = abs(found["gap_healed"]) < 0.5 * found["gap_abnormal"]
        return {**{key: round(value, 6) for key, value in found.items()}, "converged": converged}


def logits(critic: nn.Module, films: torch.Tensor) -> torch.Tensor:
    """Logits [n, 1, h, w] of overlapping patches of grey films [n, 1, H, W] in [-1, 1]."""
    return critic(films.float().expand(-1, 3, -1, -1))[0]


def score(critic: nn.Module, films: torch.Tensor) -> torch.Tensor:
    """D(x) [n]: the mean over patches."""
    return logits(critic, films).mean(dim=(1, 2, 3))


class VantGanStage(GanStage):
    """Visual feature attribution by a Wasserstein GAN (Baumgartner et al. 2018, section 3): a map M such that x + M(x)
    cannot be told from healthy films, and no larger than it need be,

        min_M max_D  E_healthy[D(x)] - E_ill[D(x + M(x))] + map_weight * |M(x)|_1  (the mean over pixels),

    D held to Lipschitz 1 by a gradient penalty (Gulrajani et al. 2017, equation 3). Theirs are a 3D U-Net and a C3D
    critic with five updates a step."""

    config: VantGanConfig
    name = "vant_gan"

    def __init__(self, setting: Setting, config: VantGanConfig) -> None:
        super().__init__(setting, config)
        self.healer = self._healer("map")
        self.critic = PatchDiscriminator(config.critic_channels)
        network = WassersteinCritic(self.critic, config.penalty_weight)
        self._take_part({"critic": self.critic}, self.healer, network)

    def loss(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        _, ill = self.films(batch, network)
        healed = network(ill)
        with frozen(self.critic) as critic, torch.autocast(healed.device.type, enabled=False):
            return self.config.map_weight * (healed - ill).abs().mean() - score(critic, healed).mean()

    def critic_loss(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        healthy, ill = self.films(batch, network)
        with torch.no_grad():
            healed = self.healer(ill).float()
        return network(healthy, healed, batch.uniform(1, 1, 1).to(healed.device))


class WassersteinCritic(nn.Module):
    """The critic's whole loss behind one forward: so several workers exchange the gradients of all its parts at once,
    and the penalty's own gradient is taken of the network itself, within each worker."""

    def __init__(self, critic: PatchDiscriminator, penalty_weight: float) -> None:
        super().__init__()
        self.critic, self.penalty_weight = critic, penalty_weight

    @torch.compiler.disable  # has no second derivatives
    def forward(self, healthy: torch.Tensor, healed: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
        """E[D(healed)] - E[D(healthy)] + penalty_weight * E[(|grad D(between)| - 1)^2], in float32."""
        with torch.autocast(healthy.device.type, enabled=False):
            between = (mix * healthy + (1 - mix) * healed).requires_grad_()
            real, fake, middle = score(self.critic, torch.cat([healthy, healed, between])).chunk(3)
            if not torch.is_grad_enabled():
                raise ValueError("the gradient penalty needs gradients")
            (gradient,) = torch.autograd.grad(middle.sum(), between, create_graph=True)
            penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
            return fake.mean() - real.mean() + self.penalty_weight * penalty


class AntGanStage(GanStage):
    """Abnormal-to-normal translation (Sun et al. 2020): generators both ways, a patch discriminator for each kind of
    film, least-squares adversarial losses (Mao et al. 2017), cycle consistency and identity as in Zhu et al. 2017
    (equations 1 to 3, section 5.2). Theirs is built on that cycle, too; of its own terms we know what its abstract and
    its successors tell, so what is beyond the cycle is not claimed to be theirs."""

    config: AntGanConfig
    name = "ant_gan"

    def __init__(self, setting: Setting, config: AntGanConfig) -> None:
        super().__init__(setting, config)
        self.healer, harmer = self._healer("image"), self._healer("image")
        self.critic, other = (PatchDiscriminator(config.critic_channels) for _ in range(2))
        self.cycle = Cycle(self.healer, harmer)
        self.critics = LeastSquaresCritics(self.critic, other)
        modules = {"harmer": harmer, "critic": self.critic, "critic-abnormal": other}
        self._take_part(modules, self.cycle, self.critics)

    def loss(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        healthy, ill = self.films(batch, network)
        healed, harmed, cycled, unchanged = network(healthy, ill)
        with frozen(self.critics), torch.autocast(ill.device.type, enabled=False):
            fooled = square(logits(self.critics.healthy, healed), 1) + square(logits(self.critics.ill, harmed), 1)
        return fooled + self.config.cycle_weight * cycled + self.config.identity_weight * unchanged

    def critic_loss(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        healthy, ill = self.films(batch, network)
        with torch.no_grad():
            healed, harmed = self.cycle.healer(ill), self.cycle.harmer(healthy)
        return network(healthy, healed, ill, harmed)


class Cycle(nn.Module):
    """Both generators behind one forward."""

    def __init__(self, healer: Any, harmer: Any) -> None:
        super().__init__()
        self.healer: Any = healer
        self.harmer: Any = harmer

    def forward(self, healthy: torch.Tensor, ill: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Healed and harmed films, and the L1 losses of the cycles and of films that are already what is wanted."""
        healed, same_healthy = self.healer(torch.cat([ill, healthy])).chunk(2)
        harmed, same_ill = self.harmer(torch.cat([healthy, ill])).chunk(2)
        cycled = (self.harmer(healed) - ill).abs().mean() + (self.healer(harmed) - healthy).abs().mean()
        return healed, harmed, cycled, (same_healthy - healthy).abs().mean() + (same_ill - ill).abs().mean()


class LeastSquaresCritics(nn.Module):
    """The discriminators of healthy and of abnormal films; forward is the loss of both."""

    def __init__(self, healthy: PatchDiscriminator, ill: PatchDiscriminator) -> None:
        super().__init__()
        self.healthy, self.ill = healthy, ill

    def forward(
        self, healthy: torch.Tensor, healed: torch.Tensor, ill: torch.Tensor, harmed: torch.Tensor
    ) -> torch.Tensor:
        real, fake = logits(self.healthy, torch.cat([healthy, healed])).chunk(2)
        loss = square(real, 1) + square(fake, 0)
        real, fake = logits(self.ill, torch.cat([ill, harmed])).chunk(2)
        return 0.5 * (loss + square(real, 1) + square(fake, 0))


def square(logits: torch.Tensor, target: float) -> torch.Tensor:
    return (logits - target).square().mean()
