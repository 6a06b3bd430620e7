"""Stage ``judge``: trains the classifier that judges validity, on class labels. The judge is stored beside the model
and is not part of it."""

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

HOLD_OUT_EVERY = 10  # every tenth image of a class is held out for calibration
MAX_HELD_OUT = 1000  # images of all classes together
BATCH_SIZE = 16  # images, when the autoencoder or the calibration runs outside of a step


class JudgeStage(Stage):
    """Trains the judge, then calibrates its temperature on held-out images."""

    def __init__(self, context: StageContext, config: JudgeConfig) -> None:
        super().__init__(context, config)
        # Hold out images for calibration.
        members = ImageOrder(context.images.images, config.classes, context.seed).members
        candidates = [images[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY] for images in members.values()]
        max_of_class = max(MAX_HELD_OUT // len(candidates), 1)
        self.held_out = sorted(index for images in candidates for index in images[:max_of_class])
        self.order = ImageOrder(context.images.images, config.classes, context.seed, frozenset(self.held_out))

        # Build the judge.
        healthy = context.bundle.recipe.data.healthy_class
        if healthy not in self.order.members:
            raise RecipeError(
                f"stage {config.name}: a judge has to know the healthy class {healthy}; add it to the stage's classes "
                f"({', '.join(sorted(self.order.members))}), or see data.healthy_class"
            )
        torch.manual_seed(context.seed)
        self.judge = Judge(sorted(self.order.members), healthy)
        self.modules = {"judge": self.judge}
        self.trainables = [Trainable("judge", self.judge, self.loss)]

        # Reconstructions are cached in blocks of BATCH_SIZE images, as uint8.
        self.kept = len(context.images.images) * context.images.size**2 <= context.cache_megabytes * 2**20
        self._blocks: dict[int, torch.Tensor] = {}

    def loss(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        """Cross-entropy on images, half of them replaced by their reconstructions, with random blur and noise: the way
        an image was made must not reveal its class."""
        # Random augmentation.
        sigma = batch.uniform()  # of the blur, in pixels
        noise = batch.uniform(1, 1) * 0.02  # standard deviation
        reconstruct = batch.uniform() < 0.5
        indices = [self.order[position] for position in batch.positions()]
        images = self.context.images.batch(indices)
        if reconstruct.any():
            images[reconstruct] = self._reconstructions([n for n, use in zip(indices, reconstruct.tolist()) if use])
        images = blur(images, sigma)
        images = images + noise * batch.normal(images.shape[1:], images)

        # Classify.
        device = next(network.parameters()).device
        return functional.cross_entropy(network(images.to(device)), self._targets(indices).to(device))

    def _targets(self, indices: Sequence[int]) -> torch.Tensor:
        """Class indices [n] of the images."""
        return torch.tensor([self.judge.classes.index(self.context.images.images[n].label) for n in indices])

    def _reconstructions(self, indices: Sequence[int]) -> torch.Tensor:
        """Return the autoencoder's reconstructions [n, H, W] in [0, 1]. If the memory allows it, each image is
        reconstructed once, in batches that do not depend on the step."""
        if not self.kept:
            return self._reconstruct(indices)
        for block in {index // BATCH_SIZE for index in indices} - self._blocks.keys():
            members = range(block * BATCH_SIZE, min((block + 1) * BATCH_SIZE, len(self.context.images.images)))
            self._blocks[block] = (self._reconstruct(members) * 255).round().byte()
        return torch.stack([self._blocks[index // BATCH_SIZE][index % BATCH_SIZE] for index in indices]).float() / 255

    @torch.no_grad()
    def _reconstruct(self, indices: Sequence[int]) -> torch.Tensor:
        vae = self.context.bundle.vae
        pixels = three_channels(self.context.images.batch(indices)).to(next(vae.parameters()).device)
        rgb: torch.Tensor = vae.decode(vae.encode(pixels).latent_dist.mean).sample.float() / 2 + 0.5
        return rgb.clamp(0, 1).mean(dim=1).cpu()

    def finish(self, device: torch.device) -> None:
        self.judge.eval()

    def export(self, store: Store) -> None:
        save_judge(self.judge, store, self._calibrate())

    @torch.no_grad()
    def _calibrate(self) -> dict[str, float]:
        """Fit the temperature on the held-out images and their reconstructions; return the measurements."""
        if not self.held_out:
            LOG.info("the judge is not calibrated: no class has %d images", HOLD_OUT_EVERY)
            return {}

        # Logits of the images, then of their reconstructions.
        device = next(self.judge.parameters()).device
        parts = []
        for load in (self.context.images.batch, self._reconstructions):
            for start in range(0, len(self.held_out), BATCH_SIZE):
                images = load(self.held_out[start : start + BATCH_SIZE])
                parts.append(self.judge(images.to(device)).double().cpu().numpy())
        logits, targets = np.concatenate(parts), np.tile(self._targets(self.held_out).numpy(), 2)

        # Fit the temperature and measure the calibration with it and without it.
        temperature = fitted_temperature(logits, targets)
        self.judge.temperature.fill_(temperature)
        measured = {
            "images": len(self.held_out),
            "chance": float(np.bincount(targets).max() / len(targets)),
            "accuracy": float((logits.argmax(1) == targets).mean()),
            "temperature": temperature,
            "calibration_error": calibration_error(_softmax(logits / temperature), targets),
            "calibration_error_before": calibration_error(_softmax(logits), targets),
        }
        LOG.info(
            "judge on %(images)d held-out images: accuracy %(accuracy).3f, calibration error %(calibration_error).3f "
            "(%(calibration_error_before).3f before temperature scaling by %(temperature).2f)",
            measured,
        )
        return measured


def _softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).softmax(1).numpy()


def blur(images: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Blur images [n, H, W], H and W above 3, with a Gaussian of ``sigma`` [n] pixels each, truncated at 3 pixels.
    Every autoencoder adds softness, which the judge must not mistake for health."""
    offsets = torch.arange(-3, 4, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (offsets[None] / sigma[:, None].clamp(min=1e-3)) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).to(images.device)
    n = len(images)
    padded = functional.pad(images[None], (3, 3, 3, 3), mode="reflect")
    rows = functional.conv2d(padded, kernel.reshape(n, 1, 1, 7), groups=n)
    return functional.conv2d(rows, kernel.reshape(n, 1, 7, 1), groups=n)[0]
