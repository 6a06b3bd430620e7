"""Stage ``judge``: trains the classifier that judges validity, on class labels. The judge is stored beside the model
and is not part of it.

``ImageClassifierStage`` is the part that all classifiers of images share: held-out images, and an augmentation by which
the way an image was made does not reveal its class.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from diffva_ray.config.recipe import RecipeError
from diffva_ray.config.stages import StageConfig
from diffva_ray.metrics.validity import Judge, calibration_error, fitted_temperature, save_judge
from diffva_ray.progress import LOG
from diffva_ray.storage.store import Store
from diffva_ray.train.sampling import ImageOrder, grey
from diffva_ray.train.stage import Batch, Inputs, Stage, StageContext, Trainable, three_channels

HOLD_OUT_EVERY = 10  # every tenth image of a class is held out for calibration
MAX_HELD_OUT = 1000  # images of all classes together
BATCH_SIZE = 16  # images, when the autoencoder or the calibration runs outside of a step


class ImageClassifierStage(Stage):
    """Trains a classifier of grey images on images and reconstructions; some images are held out."""

    def __init__(self, context: StageContext, config: StageConfig) -> None:
        super().__init__(context, config)
        # Hold out images for calibration.
        members = ImageOrder(context.images.images, config.classes, context.seed).members
        candidates = [images[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY] for images in members.values()]
        max_of_class = max(MAX_HELD_OUT // len(candidates), 1)
        self.held_out = sorted(index for images in candidates for index in images[:max_of_class])
        # An image under another label, and its mirror image, are not trained on either.
        every = context.images.images
        files = {every[index].path for index in self.held_out}
        unused = frozenset(index for index, image in enumerate(every) if image.path in files)
        self.order = ImageOrder(every, config.classes, context.seed, unused)

        torch.manual_seed(context.seed)
        self.network = self.build()
        self.modules = {config.trains: self.network}
        self.trainables = [Trainable(config.trains, self.network, self.inputs, self.loss)]

        # Reconstructions are kept in blocks of BATCH_SIZE images, as uint8.
        self.kept = len(context.images.images) * context.images.size**2 <= context.cache_megabytes * 2**20
        self._blocks: dict[int, torch.Tensor] = {}

    def build(self) -> nn.Module:
        """Return the untrained classifier. Raises RecipeError."""
        raise NotImplementedError

    def targets(self, indices: Sequence[int]) -> torch.Tensor:
        """Return what the classifier has to say of the images, one row each."""
        raise NotImplementedError

    def error(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of logits [n, ...]."""
        raise NotImplementedError

    def fill(self, device: torch.device) -> None:
        if self.kept:
            self._fill_blocks(range(-(-len(self.context.images.images) // BATCH_SIZE)), device)

    def _fill_blocks(self, blocks: Iterable[int], device: torch.device) -> None:
        """Reconstruct blocks of images, once each; the blocks do not depend on the step."""
        images = self.context.images
        for block in sorted(set(blocks) - self._blocks.keys()):
            members = range(block * BATCH_SIZE, min((block + 1) * BATCH_SIZE, len(images.images)))
            reconstructions = self._reconstruct(images.stack(members).to(device))
            self._blocks[block] = (reconstructions * 255).round().byte().cpu()

    def _kept_rows(self, indices: Sequence[int]) -> torch.Tensor:
        """Return kept reconstructions, uint8 [n, H, W]."""
        return torch.stack([self._blocks[index // BATCH_SIZE][index % BATCH_SIZE] for index in indices])

    def inputs(self, batch: Batch) -> Inputs:
        """Return a share's images, random augmentation and classes."""
        random = batch.random
        sigma = random.uniform()  # of the blur, in pixels
        deviation = random.uniform(1, 1) * 0.02  # of the noise
        reconstruct = random.uniform() < 0.5
        indices = [self.order[position] for position in batch.positions()]
        pixels = self.context.images.stack(indices)
        rows = reconstruct.nonzero()[:, 0]
        if self.kept and len(rows):
            pixels[rows] = self._kept_rows([indices[row] for row in rows])
            rows = rows[:0]
        return {
            "pixels": pixels,
            "rows": rows,  # those that are still to be reconstructed
            "sigma": sigma,
            "noise": deviation * random.normal(*pixels.shape[1:]),
            "target": self.targets(indices),
        }

    def loss(self, network: nn.Module, inputs: Inputs) -> torch.Tensor:
        """The error on images, half of them replaced by their reconstructions, with random blur and noise: the way an
        image was made must not reveal its class."""
        images, rows = grey(inputs["pixels"]), inputs["rows"]
        if len(rows):
            images = images.index_copy(0, rows, self._reconstruct(inputs["pixels"][rows]))
        images = blur(images, inputs["sigma"]) + inputs["noise"]
        return self.error(network(images), inputs["target"])

    @torch.no_grad()
    def _reconstruct(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the autoencoder's reconstructions [n, H, W] in [0, 1] of uint8 images."""
        vae = self.context.bundle.vae
        latents = vae.encode(three_channels(grey(pixels))).latent_dist.mean
        rgb: torch.Tensor = vae.decode(latents).sample.float() / 2 + 0.5
        return rgb.clamp(0, 1).mean(dim=1)

    def finish(self, device: torch.device) -> None:
        self.network.eval()

    @torch.no_grad()
    def held_out_logits(self) -> NDArray[np.float64]:
        """Return the logits of the held-out images, then those of their reconstructions."""
        device = next(self.network.parameters()).device
        parts = []
        for reconstructed in (False, True):
            for start in range(0, len(self.held_out), BATCH_SIZE):
                indices = self.held_out[start : start + BATCH_SIZE]
                if from_memory := reconstructed and self.kept:
                    self._fill_blocks({index // BATCH_SIZE for index in indices}, device)
                pixels = (self._kept_rows if from_memory else self.context.images.stack)(indices).to(device)
                images = self._reconstruct(pixels) if reconstructed and not from_memory else grey(pixels)
                parts.append(self.network(images).double().cpu().numpy())
        return np.concatenate(parts)


class JudgeStage(ImageClassifierStage):
    """Trains the judge, then calibrates its temperature on held-out images."""

    network: Judge

    @property
    def judge(self) -> Judge:
        return self.network

    def build(self) -> Judge:
        healthy = self.context.bundle.recipe.data.healthy_class
        if healthy not in self.order.members:
            raise RecipeError(
                f"stage {self.config.name}: a judge has to know the healthy class {healthy}; add it to the stage's "
                f"classes ({', '.join(sorted(self.order.members))}), or see data.healthy_class"
            )
        return Judge(sorted(self.order.members), healthy)

    def targets(self, indices: Sequence[int]) -> torch.Tensor:
        """Return the class indices [n] of the images."""
        return torch.tensor([self.judge.classes.index(self.context.images.images[n].label) for n in indices])

    def error(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy."""
        return functional.cross_entropy(logits, targets)

    def export(self, store: Store) -> None:
        save_judge(self.judge, store, self._calibrate())

    def _calibrate(self) -> dict[str, float]:
        """Fit the temperature on the held-out images and their reconstructions; return the measurements."""
        if not self.held_out:
            LOG.info("the judge is not calibrated: no class has %d images", HOLD_OUT_EVERY)
            return {}
        logits, targets = self.held_out_logits(), np.tile(self.targets(self.held_out).numpy(), 2)

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
    offsets = torch.arange(-3, 4, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-0.5 * (offsets[None] / sigma[:, None].clamp(min=1e-3)) ** 2)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    n = len(images)
    padded = functional.pad(images[None], (3, 3, 3, 3), mode="reflect")
    rows = functional.conv2d(padded, kernel.reshape(n, 1, 1, 7), groups=n)
    return functional.conv2d(rows, kernel.reshape(n, 1, 7, 1), groups=n)[0]
