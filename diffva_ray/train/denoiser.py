"""Stage ``denoiser``: trains UNet and text encoder together to predict noise.

The condition is the image's caption or its class's prompt. It is replaced by "" at a given rate, so that guidance has a
trained unconditional branch. With a class set, the loss includes DreamBooth's prior preservation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler
from torch import nn

from diffva_ray.config.recipe import RecipeError
from diffva_ray.config.stages import DenoiserConfig, NoisePredictionConfig
from diffva_ray.data.dataset import LabelledImage
from diffva_ray.model import text
from diffva_ray.model.cross_attention import cross_attention_parameters
from diffva_ray.model.image_conditioning import add_image_channels, reads_image, with_image
from diffva_ray.model.lora import adapter_parameters, attached
from diffva_ray.progress import LOG
from diffva_ray.train.class_images import class_images
from diffva_ray.train.latents import Latents
from diffva_ray.train.loss import denoising_loss, min_snr_weights
from diffva_ray.train.pairs import Examples, Pairs
from diffva_ray.train.sampling import ImageOrder, ImageSet
from diffva_ray.train.stage import Batch, Stage, StageContext, Trainable


class NoisePrediction(Stage):
    """Base of the stages that learn to predict noise: images, noise, prompts and the loss."""

    config: NoisePredictionConfig

    def __init__(self, context: StageContext, config: NoisePredictionConfig) -> None:
        super().__init__(context, config)
        self.order = ImageOrder(context.images.images, config.classes, context.seed)
        self.images = Latents(context, context.images)
        self.prior: ClassSet | None = None
        self.pairs: Pairs | None = None
        self._warn_of_long_captions()
        self.noise_scheduler = DDPMScheduler.from_config(context.bundle.scheduler)

    def inputs(self, indices: Sequence[int], device: torch.device) -> tuple[torch.Tensor, ...]:
        """Return further inputs of the network, after noisy latents, timesteps and prompts."""
        return ()

    def loss(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        """Weighted mean squared error of the prediction. As in DreamBooth's script, instances and class set form one
        batch, and each image has its own noise and timestep."""
        data = self.context.bundle.recipe.data
        device = next(network.parameters()).device
        positions = batch.positions()
        indices = [self.order[position] for position in positions]
        mean, std = self.images.moments(indices, device)
        prompts = [self._prompt(self.context.images.images[index]) for index in indices]
        groups, rows, prior_loss_weight = 1, list(batch.rows), 0.0

        # DreamBooth's prior preservation (Ruiz et al. 2023, equation 2): append the class set to the instances.
        if self.prior is not None:
            groups, prior_loss_weight = 2, self.prior.loss_weight
            prior_mean, prior_std = self.prior.images.moments(
                [self.prior.order[position] for position in positions], device
            )
            mean, std = torch.cat([mean, prior_mean]), torch.cat([std, prior_std])
            prompts += [data.prompt(self.prior.label)] * len(indices)
            rows += [batch.size + row for row in batch.rows]

        # Every worker draws the random numbers of the whole batch, so that they do not depend on the number of workers.
        whole = Batch(batch.step, groups * batch.size, rows, batch.generator)
        posterior_noise = whole.normal(mean.shape[1:], mean)
        noise = whole.normal(mean.shape[1:], mean)
        steps = self.noise_scheduler.config.num_train_timesteps
        timesteps = torch.randint(0, steps, (whole.size,), generator=batch.generator)[rows].to(device)
        dropped = whole.uniform() < self.config.prompt_dropout

        # z ~ q(z | x), then z_t = sqrt(a_t) z + sqrt(1 - a_t) e (Rombach et al. 2022).
        latents = (mean + std * posterior_noise) * self.context.bundle.vae.config.scaling_factor
        prompts = ["" if drop else prompt for prompt, drop in zip(prompts, dropped.tolist(), strict=True)]
        examples = Examples(indices, mean, latents, prompts, timesteps)
        if self.pairs is not None:
            self.pairs.edit(examples, whole, steps)
        noisy = self.noise_scheduler.add_noise(examples.latents, noise, examples.timesteps)

        # Predict, and compare with the target.
        noisy = with_image(self.context.bundle.unet, noisy, examples.image)
        tokens = self.tokens(examples.prompts, device)
        output = network(noisy, examples.timesteps, *tokens, *self.inputs(indices, device))
        weights = None
        if self.config.snr_gamma is not None:
            alphas = self.noise_scheduler.alphas_cumprod.to(device)
            weights = min_snr_weights(alphas, examples.timesteps, self.config.snr_gamma, self.prediction_type)
        target = self.target(examples.latents, noise, examples.timesteps)
        return denoising_loss(output, target, weights, len(indices), prior_loss_weight, examples.emphasis)

    def _prompt(self, image: LabelledImage) -> str:
        """The image's caption if it has one, otherwise the prompt of its class."""
        return image.caption or self.context.bundle.recipe.data.prompt(image.label)

    def _warn_of_long_captions(self) -> None:
        captions = {image.caption for image in self.context.images.images}
        tokenizer = self.context.bundle.tokenizer
        if too_long := sorted(caption for caption in captions if not text.fits(tokenizer, caption)):
            LOG.warning(
                "%d captions are longer than %d tokens (model.tokenizer_length) and are truncated, for example %r",
                len(too_long),
                tokenizer.model_max_length,
                too_long[0],
            )

    @property
    def prediction_type(self) -> str:
        return str(self.noise_scheduler.config.prediction_type)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return what the network has to predict: the noise, or the velocity (Salimans & Ho 2022)."""
        if self.prediction_type == "v_prediction":
            velocity: torch.Tensor = self.noise_scheduler.get_velocity(latents, noise, timesteps)
            return velocity
        return noise

    def tokens(self, prompts: Sequence[str], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokenize the distinct prompts, so that the encoder runs once on each. Return ids and mask [distinct, length],
        and for every image the index of its prompt [n]."""
        distinct = sorted(set(prompts))
        ids, mask = text.tokenize(self.context.bundle.tokenizer, distinct)
        which = torch.tensor([distinct.index(prompt) for prompt in prompts])
        return ids.to(device), mask.to(device), which.to(device)


@dataclass(frozen=True)
class ClassSet:
    """DreamBooth's class set."""

    label: str  # class of all its images
    order: ImageOrder
    images: Latents
    loss_weight: float  # of the class set's loss, where the instances' loss has 1


class DenoiserStage(NoisePrediction):
    """Fine-tunes UNet and text encoder, or their LoRA adapters."""

    config: DenoiserConfig

    def __init__(self, context: StageContext, config: DenoiserConfig) -> None:
        super().__init__(context, config)
        if config.prior_class and config.class_images == "real":
            self.prior = self._class_set(context.images, self.images)
        if config.pairs:
            self._check_pairs()
            self.pairs = Pairs(context, config.pairs)
            if not reads_image(context.bundle.unet):
                add_image_channels(context.bundle.unet)
        network = Denoiser(context.bundle.unet, context.bundle.text_encoder)
        self.trainables = [Trainable("denoiser", network, self.loss, shardable=True)]

    def begin(self, device: torch.device, first: bool, wait: Callable[[], None]) -> None:
        config = self.config
        if config.prior_class and config.class_images == "generated":
            generated = class_images(self.context, config, device, first, wait)
            self.prior = self._class_set(generated, Latents(self.context, generated))
        for parameter in self._trainable_parameters():
            parameter.requires_grad_(True)

    def _check_pairs(self) -> None:
        """Raise RecipeError for keys under which the new input channels could not be trained or used."""
        recipe, config = self.context.bundle.recipe, self.config
        for other, used in {
            "train.lora": recipe.train.lora is not None,
            "trainable: cross-attention": config.trainable != "all",
            "class_images: generated": config.class_images == "generated" and recipe.model.base is None,
        }.items():
            if used:
                raise RecipeError(f"stage {config.name}: pairs cannot be combined with {other}")

    def _class_set(self, images: ImageSet, latents: Latents) -> ClassSet:
        label = str(self.config.prior_class)
        order = ImageOrder(images.images, {label: 1}, self.context.seed + 1)
        return ClassSet(label, order, latents, self.config.prior_loss_weight)

    def _trainable_parameters(self) -> list[nn.Parameter]:
        """LoRA adapters if attached, otherwise all weights; with ``trainable: cross-attention``, only the UNet's
        parameters that read the prompt."""
        unet, encoder = self.context.bundle.unet, self.context.bundle.text_encoder
        candidates = adapter_parameters(unet) if attached(unet) else dict(unet.named_parameters())
        if self.config.trainable == "cross-attention":
            names = cross_attention_parameters(unet)
            return [parameter for name, parameter in candidates.items() if name in names]
        parameters = list(candidates.values())
        if self.config.train_text_encoder:
            adapters = adapter_parameters(encoder) if attached(encoder) else dict(encoder.named_parameters())
            parameters += adapters.values()
        return parameters


class Denoiser(nn.Module):
    """UNet and text encoder behind one forward, so that DDP and gradient accumulation see one module."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        ids: torch.Tensor,
        mask: torch.Tensor,
        which: torch.Tensor,
    ) -> torch.Tensor:
        states = text.embed(self.text_encoder, ids, mask)[which]
        output: torch.Tensor = self.unet(noisy, timesteps, encoder_hidden_states=states).sample
        return output
