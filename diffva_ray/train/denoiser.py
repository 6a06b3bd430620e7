"""Stage ``denoiser``: trains UNet and text encoder together to predict noise.

The condition is the image's caption or its class's prompt. It is replaced by "" at a given rate, so that guidance has a
trained unconditional branch. With a class set, the loss includes DreamBooth's prior preservation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import DDPMScheduler
from torch import nn

from diffva_ray.config.recipe import RecipeError
from diffva_ray.config.stages import DenoiserConfig, NoisePredictionConfig
from diffva_ray.data.captions import Captions
from diffva_ray.data.dataset import LabelledImage
from diffva_ray.model import text
from diffva_ray.model.cross_attention import cross_attention_parameters
from diffva_ray.model.image_conditioning import add_image_channels, reads_image, with_image
from diffva_ray.model.lora import adapter_parameters, attached
from diffva_ray.progress import LOG
from diffva_ray.train.class_images import class_images
from diffva_ray.train.latents import Latents, latents_of
from diffva_ray.train.loss import denoising_loss, min_snr_weights
from diffva_ray.train.pairs import Pairs
from diffva_ray.train.sampling import ImageOrder, ImageSet, RandomRows
from diffva_ray.train.stage import Batch, Inputs, Stage, StageContext, Trainable, Worker

ALIKE = 0.01  # distance of embeddings; 0.1 to 0.8 in trained models, 0.001 after a training that had collapsed


class NoisePrediction(Stage):
    """Base of the stages that learn to predict noise: images, noise, prompts and the loss."""

    config: NoisePredictionConfig

    def __init__(self, context: StageContext, config: NoisePredictionConfig) -> None:
        super().__init__(context, config)
        self.order = ImageOrder(context.images.images, config.classes, context.seed)
        self.images = latents_of(context, context.images)
        self.prior: ClassSet | None = None
        self.pairs: Pairs | None = None
        self.captions = self._captions()
        self._warn_of_long_captions()
        self.noise_scheduler = DDPMScheduler.from_config(context.bundle.scheduler)

    def further(self, indices: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """Return further inputs of the network, after noisy latents, timesteps and prompts."""
        return ()

    def fill(self, device: torch.device) -> None:
        self.images.fill(device)
        if self.prior is not None:
            self.prior.images.fill(device)
        if self.pairs is not None:
            self.pairs.truths.fill(device)

    def inputs(self, batch: Batch) -> Inputs:
        """Return a share's images, noise, timesteps and prompts. As in DreamBooth's script, instances and class set
        form one batch, and each image has its own noise and timestep."""
        data = self.context.bundle.recipe.data
        positions = batch.positions()
        indices = [self.order[position] for position in positions]
        images = [self.images.inputs(indices)]
        prompts = [
            self._prompt(self.context.images.images[index], position)
            for index, position in zip(indices, positions, strict=True)
        ]
        captions, groups, rows = prompts, 1, list(batch.rows)

        # DreamBooth's prior preservation (Ruiz et al. 2023, equation 2): append the class set to the instances.
        if self.prior is not None:
            groups = 2
            images.append(self.prior.images.inputs([self.prior.order[position] for position in positions]))
            prompts = [*captions, *[data.prompt(self.prior.label)] * len(indices)]
            rows += [batch.size + row for row in batch.rows]

        # Draw the random numbers of these rows.
        random, shape = RandomRows(batch.generator, groups * batch.size, rows), self.images.shape
        steps = self.noise_scheduler.config.num_train_timesteps
        posterior_noise, noise = random.normal(*shape), random.normal(*shape)
        timesteps = random.integers(steps)
        dropped = random.uniform() < self.config.prompt_dropout
        prompts = ["" if drop else prompt for prompt, drop in zip(prompts, dropped.tolist(), strict=True)]
        edits = None if self.pairs is None else self.pairs.edits(indices, captions, prompts, timesteps, random, steps)
        return {
            "instances": len(indices),
            "images": images,
            "posterior_noise": posterior_noise,
            "noise": noise,
            "timesteps": timesteps,
            "edits": edits,
            "tokens": self.tokens(prompts),
            "further": self.further(indices),
        }

    def loss(self, network: nn.Module, inputs: Inputs) -> torch.Tensor:
        """Weighted mean squared error of the prediction."""
        # z ~ q(z | x), then z_t = sqrt(a_t) z + sqrt(1 - a_t) e (Rombach et al. 2022).
        sets = [self.images, *([] if self.prior is None else [self.prior.images])]
        moments = [latents.moments(images) for latents, images in zip(sets, inputs["images"], strict=True)]
        mean, std = (torch.cat(parts) for parts in zip(*moments, strict=True))
        latents = (mean + std * inputs["posterior_noise"]) * self.context.bundle.vae.config.scaling_factor
        image = emphasis = None
        if self.pairs is not None:
            latents, image, emphasis = self.pairs.edited(inputs["edits"], mean, latents)
        noise, timesteps = inputs["noise"], inputs["timesteps"]
        noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)

        # Predict, and compare with the target.
        noisy = with_image(self.context.bundle.unet, noisy, image)
        output = network(noisy, timesteps, *inputs["tokens"], *inputs["further"])
        weights = None
        if self.config.snr_gamma is not None:
            alphas = self.noise_scheduler.alphas_cumprod.to(noisy.device)
            weights = min_snr_weights(alphas, timesteps, self.config.snr_gamma, self.prediction_type)
        target = self.target(latents, noise, timesteps)
        prior_loss_weight = 0.0 if self.prior is None else self.prior.loss_weight
        return denoising_loss(output, target, weights, inputs["instances"], prior_loss_weight, emphasis)

    def _prompt(self, image: LabelledImage, position: int) -> str:
        """The image's caption if it has one, else one made for this position in the order, else its class's prompt."""
        if image.caption or self.captions is None:
            return image.caption or self.context.bundle.recipe.data.prompt(image.label)
        return self.captions.caption(image, self.context.seed, self.config.name, position)

    def _captions(self) -> Captions | None:
        """Captions by ``data.captions``. Raises RecipeError for captions that would be cut."""
        data, images = self.context.bundle.recipe.data, self.context.images
        if data.captions is None:
            return None
        tokenizer = self.context.bundle.tokenizer
        fits = partial(text.fits, tokenizer)
        captions = Captions(data.captions, data, images.store, images.images, images.shapes, fits)
        longest = captions.longest(lambda caption: text.tokens_of(tokenizer, caption))
        if (count := text.tokens_of(tokenizer, longest)) > tokenizer.model_max_length:
            raise RecipeError(
                f"data.captions: a caption such as {longest!r} has {count} tokens; raise model.tokenizer_length from "
                f"{tokenizer.model_max_length}, or shorten data.captions.templates"
            )
        return captions

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

    def tokens(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokenize the distinct prompts, so that the encoder runs once on each. Return ids and mask [distinct, length],
        and for every image the index of its prompt [n]."""
        distinct = sorted(set(prompts))
        ids, mask = text.tokenize(self.context.bundle.tokenizer, distinct)
        return ids, mask, torch.tensor([distinct.index(prompt) for prompt in prompts])


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
        self.trainables = [Trainable("denoiser", network, self.inputs, self.loss, shardable=True)]

    def begin(self, worker: Worker) -> None:
        config = self.config
        if config.prior_class and config.class_images == "generated":
            generated = class_images(self.context, config, worker)
            self.prior = self._class_set(generated, latents_of(self.context, generated))
        for parameter in self.trained_parameters():
            parameter.requires_grad_(True)

    def finish(self, device: torch.device) -> None:
        """Warn of a text encoder that has lost the words: then every prompt gives the same image."""
        bundle = self.context.bundle
        prompts = ["", *bundle.recipe.data.prompts.values()]
        if self.config.train_text_encoder and text.distance(bundle.tokenizer, bundle.text_encoder, prompts) < ALIKE:
            LOG.warning(
                "stage %s: the text encoder gives all prompts the same embedding, so that no prompt will change "
                "anything; train again with train_text_encoder: false, or a lower learning_rate",
                self.config.name,
            )

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

    def trained_parameters(self) -> list[nn.Parameter]:
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
