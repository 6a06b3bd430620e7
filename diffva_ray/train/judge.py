"""The judge of validity, on labels alone. It is kept beside the model and is no part of it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from diffva_ray.config_stages import JudgeConfig
from diffva_ray.metrics.validity import Judge, blur, save_judge
from diffva_ray.storage import Store
from diffva_ray.train.sampling import Draws
from diffva_ray.train.stage import Batch, Player, Setting, Stage


class JudgeStage(Stage):
    def __init__(self, setting: Setting, config: JudgeConfig) -> None:
        super().__init__(setting, config)
        self.draws = Draws(setting.films.films, config.classes, setting.seed)
        torch.manual_seed(setting.seed)
        self.judge = Judge(sorted(self.draws.members), setting.bundle.recipe.data.healthy_class)
        self.modules = {"judge": self.judge}
        self.players = [Player("judge", self.judge, self.loss)]

    def loss(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        """Cross-entropy on films blurred and noised by chance, as autoencoders leave them."""
        sigma = batch.uniform()
        noise = batch.uniform(1, 1) * 0.02
        indices = [self.draws[position] for position in batch.positions()]
        films = blur(self.setting.films.batch(indices), sigma)
        films = films + noise * batch.normal(films.shape[1:], films)
        target = torch.tensor([self.judge.classes.index(self.setting.films.films[n].label) for n in indices])
        device = next(network.parameters()).device
        return functional.cross_entropy(network(films.to(device)), target.to(device))

    def finish(self, device: torch.device) -> None:
        self.judge.eval()

    def export(self, store: Store) -> None:
        save_judge(self.judge, store)
