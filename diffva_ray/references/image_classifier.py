"""The classifier of images that Singla's, Charachon's and STEEX's methods explain, and what its explainers share.

It is trained on the classes of the data and is never the judge. Both have the same architecture and the same training
images (with other initial weights), so flip rates of these methods are favourable to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn
from torch.nn import functional

from diffva_ray.config.recipe import RecipeError
from diffva_ray.config.reference_stages import GanConfig, ImageClassifierConfig
from diffva_ray.counterfactual.latent_diffusion import LatentDiffusion
from diffva_ray.metrics.validity import Judge
from diffva_ray.references.gan import GanStage
from diffva_ray.train.sampling import ImageOrder, grey
from diffva_ray.train.stage import Batch, Inputs, Stage, StageContext, Trainable, Worker

NAME = "image_classifier"  # its folder in the model


class ImageClassifier(ModelMixin, ConfigMixin):
    """Classifier of grey images into ``classes``."""

    @register_to_config  # type: ignore[untyped-decorator]  # of diffusers
    def __init__(self, classes: Sequence[str], healthy: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of diffusers
        self.network = Judge(classes, healthy)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [n, classes] of grey images [n, H, W] in [0, 1]."""
        logits: torch.Tensor = self.network(images)
        return logits

    def log_odds(self, images: torch.Tensor) -> torch.Tensor:
        """Log odds [n] of "not healthy" of grey images [n, H, W] in [0, 1]."""
        logits, healthy = self.forward(images), self.network.classes.index(self.network.healthy)
        others = torch.cat([logits[:, :healthy], logits[:, healthy + 1 :]], dim=1)
        return others.logsumexp(1) - logits[:, healthy]


def classifier_of(model: LatentDiffusion) -> Any:
    """The model's classifier of images, on its device. Raises UnusableModel without one."""
    with torch.inference_mode(False):  # weights that are loaded in inference mode cannot take part in a gradient
        device = next(model.unet.parameters()).device
        return model.bundle.extra(NAME).to(device, torch.float32).eval().requires_grad_(False)


class ImageClassifierStage(Stage):
    """Trains the classifier by cross-entropy, with weak noise."""

    config: ImageClassifierConfig

    def __init__(self, context: StageContext, config: ImageClassifierConfig) -> None:
        super().__init__(context, config)
        healthy = context.bundle.recipe.data.healthy_class
        self.order = ImageOrder(context.images.images, config.classes, context.seed)
        self.classes = sorted(self.order.members)
        if healthy not in self.classes or len(self.classes) < 2:
            raise RecipeError(f"stage {config.name}: needs the healthy class {healthy} and another one")
        torch.manual_seed(context.seed + 1)  # not the judge's initial weights
        self.classifier: Any = ImageClassifier(self.classes, healthy)
        context.bundle.extras[NAME] = self.classifier
        self.modules = {NAME: self.classifier}
        self.trainables = [Trainable("classifier", self.classifier, self.inputs, self.loss)]

    def begin(self, worker: Worker) -> None:
        self.classifier.requires_grad_(True)

    def inputs(self, batch: Batch) -> Inputs:
        """Return the images, noise and classes of a share."""
        indices = [self.order[position] for position in batch.positions()]
        pixels = self.context.images.stack(indices)
        labels = [self.context.images.images[index].label for index in indices]
        target = torch.tensor([self.classes.index(label) for label in labels])
        return {"pixels": pixels, "noise": 0.02 * batch.random.normal(*pixels.shape[1:]), "target": target}

    def loss(self, network: nn.Module, inputs: Inputs) -> torch.Tensor:
        return functional.cross_entropy(network(grey(inputs["pixels"]) + inputs["noise"]), inputs["target"])


class ExplainerStage(GanStage):
    """Base of the stages that train generators against the classifier, which an earlier stage has trained. ``removed``
    is measured by the classifier's log odds."""

    def __init__(self, context: StageContext, config: GanConfig) -> None:
        super().__init__(context, config)
        if NAME not in context.bundle.extras:
            raise RecipeError(f"stage {config.name}: put a stage that `trains: image-classifier` before it")
        self.classifier = context.bundle.extras[NAME]

    def begin(self, worker: Worker) -> None:
        super().begin(worker)
        self.classifier.to(worker.device).eval().requires_grad_(False)

    def log_odds(self, images: torch.Tensor) -> torch.Tensor:
        """Log odds [n] of "not healthy" of images [n, 1, H, W] in [-1, 1]."""
        odds: torch.Tensor = self.classifier.log_odds(images[:, 0].float() / 2 + 0.5)
        return odds

    def rate(self, images: torch.Tensor) -> torch.Tensor:
        return -self.log_odds(images)
