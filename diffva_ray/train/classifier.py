"""Stage ``classifier``: trains a classifier of noisy latents on class labels. The classifier guides method
``classifier-guided`` and is never used as a judge."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler
from torch import nn
from torch.nn import functional

from diffva_ray.config.recipe import RecipeError
from diffva_ray.config.stages import ClassifierConfig
from diffva_ray.model.classifier import LatentClassifier
from diffva_ray.train.latents import latents_of
from diffva_ray.train.sampling import ImageOrder
from diffva_ray.train.stage import Batch, Inputs, Stage, StageContext, Trainable, Worker


class ClassifierStage(Stage):
    """Trains on latents, so it has to come after the autoencoder's stage. Noise levels are those of the model's
    schedule."""

    config: ClassifierConfig

    def __init__(self, context: StageContext, config: ClassifierConfig) -> None:
        super().__init__(context, config)
        bundle = context.bundle
        healthy = bundle.recipe.data.healthy_class
        self.order = ImageOrder(context.images.images, config.classes, context.seed)
        self.latents = latents_of(context, context.images)
        self.noise_scheduler = DDPMScheduler.from_config(bundle.scheduler)
        torch.manual_seed(context.seed)
        try:
            self.classifier = LatentClassifier(
                sorted(self.order.members),
                healthy,
                bundle.vae.config.latent_channels,
                config.block_out_channels,
                config.norm_num_groups,
            )
        except ValueError as error:
            raise RecipeError(f"stage {config.name}: {error}") from None
        bundle.extras["classifier"] = self.classifier  # here, as a resumed training may start after this stage
        self.modules = {"classifier": self.classifier}
        self.trainables = [Trainable("classifier", self.classifier, self.inputs, self.loss)]

    def begin(self, worker: Worker) -> None:
        self.classifier.requires_grad_(True)

    def fill(self, device: torch.device) -> None:
        self.latents.fill(device)

    def inputs(self, batch: Batch) -> Inputs:
        """Return the images, noise, timesteps up to ``noise_limit``, and classes of a share."""
        indices = [self.order[position] for position in batch.positions()]
        random, shape = batch.random, self.latents.shape
        posterior_noise, noise = random.normal(*shape), random.normal(*shape)
        steps = self.config.noise_limit * self.noise_scheduler.config.num_train_timesteps
        return {
            "images": self.latents.inputs(indices),
            "posterior_noise": posterior_noise,
            "noise": noise,
            "timesteps": (random.uniform() * steps).long(),
            "target": torch.tensor(
                [self.classifier.classes.index(self.context.images.images[n].label) for n in indices]
            ),
        }

    def loss(self, network: nn.Module, inputs: Inputs) -> torch.Tensor:
        """Cross-entropy at timesteps sampled uniformly (Dhariwal & Nichol 2021) up to ``noise_limit``: generation
        noises images only up to its strength, and stronger noise hides lesions."""
        mean, std = self.latents.moments(inputs["images"])
        latents = (mean + std * inputs["posterior_noise"]) * self.context.bundle.vae.config.scaling_factor
        noisy = self.noise_scheduler.add_noise(latents, inputs["noise"], inputs["timesteps"])
        return functional.cross_entropy(network(noisy, inputs["timesteps"]), inputs["target"])
