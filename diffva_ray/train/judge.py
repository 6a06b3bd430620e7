"""The judge of validity, on labels alone. It is kept beside the model and is no part of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from diffva_ray.config.recipe import RecipeError
from diffva_ray.config.stages import JudgeConfig
from diffva_ray.metrics.validity import Judge, calibration_error, fitted_temperature, save_judge
from diffva_ray.progress import LOG
from diffva_ray.storage.store import Store
from diffva_ray.train.sampling import ImageOrder
from diffva_ray.train.stage import Batch, Stage, StageContext, Trainable, three_channels

EVERY, MOST = 10, 1000  # every tenth image of a class is held out to calibrate, so many in all at most
AT_ONCE = 16


class JudgeStage(Stage):
    def __init__(self, context: StageContext, config: JudgeConfig) -> None:
        super().__init__(context, config)
        everything = ImageOrder(context.images.images, config.classes, context.seed)
        tenths = {label: images[EVERY - 1 :: EVERY] for label, images in everything.members.items()}
        each = max(MOST // len(tenths), 1)
        self.held_out = sorted(index for images in tenths.values() for index in images[:each])
        self.order = ImageOrder(context.images.images, config.classes, context.seed, frozenset(self.held_out))
        healthy = context.bundle.recipe.data.healthy_class
        if healthy not in self.order.members:
            raise RecipeError(
                f"stage {config.name}: a judge has to know the healthy class {healthy}, which is not among its classes "
                f"{', '.join(sorted(self.order.members))}; see data.healthy_class"
            )
        torch.manual_seed(context.seed)
        self.judge = Judge(sorted(self.order.members), healthy)
        self.modules = {"judge": self.judge}
        self.kept = len(context.images.images) * context.images.size**2 <= context.cache_megabytes * 2**20
        self._blocks: dict[int, torch.Tensor] = {}
        self.trainables = [Trainable("judge", self.judge, self.loss)]

    def loss(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        """Cross-entropy on images, half of them as the autoencoder gives them back, blurred and noised by chance: how a
        image was made must not tell what is on it."""
        sigma = batch.uniform()
        noise = batch.uniform(1, 1) * 0.02
        through = batch.uniform() < 0.5
        indices = [self.order[position] for position in batch.positions()]
        images = self.context.images.batch(indices)
        if through.any():
            images[through] = self._reconstructed([n for n, chosen in zip(indices, through.tolist()) if chosen])
        images = blur(images, sigma)
        images = images + noise * batch.normal(images.shape[1:], images)
        device = next(network.parameters()).device
        return functional.cross_entropy(network(images.to(device)), self._targets(indices).to(device))

    def _targets(self, indices: Sequence[int]) -> torch.Tensor:
        return torch.tensor([self.judge.classes.index(self.context.images.images[n].label) for n in indices])

    def _reconstructed(self, indices: Sequence[int]) -> torch.Tensor:
        """Images [n, H, W] in [0, 1] as the autoencoder gives them back: each once, in batches that do not depend on
        the step, where memory allows."""
        if not self.kept:
            return self._through(indices)
        for block in {index // AT_ONCE for index in indices} - self._blocks.keys():
            members = range(block * AT_ONCE, min((block + 1) * AT_ONCE, len(self.context.images.images)))
            self._blocks[block] = (self._through(members) * 255).round().byte()
        return torch.stack([self._blocks[index // AT_ONCE][index % AT_ONCE] for index in indices]).float() / 255

    @torch.no_grad()
    def _through(self, indices: Sequence[int]) -> torch.Tensor:
        vae = self.context.bundle.vae
        pixels = three_channels(self.context.images.batch(indices)).to(next(vae.parameters()).device)
        colours = vae.decode(vae.encode(pixels).latent_dist.mean).sample.float() / 2 + 0.5
        return colours.clamp(0, 1).mean(dim=1).cpu()

    def finish(self, device: torch.device) -> None:
        self.judge.eval()

    def export(self, store: Store) -> None:
        save_judge(self.judge, store, self._calibrate())

    @torch.no_grad()
    def _calibrate(self) -> dict[str, float]:
        """Set the temperature on the images held out, as they are and as the autoencoder gives them back; what was
        measured there."""
        if not self.held_out:
            LOG.info("the judge is not calibrated: no class has %d images", EVERY)
            return {}
        device = next(self.judge.parameters()).device
        logits, targets = [], self._targets(self.held_out).numpy()
        for taken in (self.context.images.batch, self._reconstructed):
            for start in range(0, len(self.held_out), AT_ONCE):
                images = taken(self.held_out[start : start + AT_ONCE])
                logits.append(self.judge(images.to(device)).double().cpu().numpy())
        told, targets = np.concatenate(logits), np.concatenate([targets, targets])
        temperature = fitted_temperature(told, targets)
        self.judge.temperature.fill_(temperature)
        measured = {
            "images": len(self.held_out),
            "chance": float(np.bincount(targets).max() / len(targets)),
            "accuracy": float((told.argmax(1) == targets).mean()),
            "temperature": temperature,
            "calibration_error": calibration_error(_softmax(told / temperature), targets),
            "calibration_error_before": calibration_error(_softmax(told), targets),
        }
        LOG.info(
            "the judge on %(images)d images held out: accuracy %(accuracy).3f, calibration error "
            "%(calibration_error).3f "
            "(%(calibration_error_before).3f before its temperature %(temperature).2f)", measured,
        )  # fmt: skip
        return measured


def _softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).softmax(1).numpy()


def blur(images: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Images [n, H, W], sides above 3, under a Gaussian of ``sigma`` [n] pixels each, cut off at 3 pixels: the judge
    must not take softness, which every autoencoder adds, for health."""
    offsets = torch.arange(-3, 4, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (offsets[None] / sigma[:, None].clamp(min=1e-3)) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).to(images.device)
    n = len(images)
    padded = functional.pad(images[None], (3, 3, 3, 3), mode="reflect")
    rows = functional.conv2d(padded, kernel.reshape(n, 1, 1, 7), groups=n)
    return functional.conv2d(rows, kernel.reshape(n, 1, 7, 1), groups=n)[0]
