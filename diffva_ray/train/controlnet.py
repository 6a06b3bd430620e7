"""Stage ``controlnet``: trains a ControlNet beside the frozen model (Zhang et al. 2023; the paper's equation 7) to
predict noise from the prompt and a condition image: lungs and edges, or a user's own. Each stage adds a ControlNet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import ControlNetModel
from numpy.typing import NDArray
from torch import nn

from diffva_ray.config.recipe import RecipeError
from diffva_ray.config.stages import ControlNetStageConfig
from diffva_ray.data.conditions import condition, decode_condition, own_columns
from diffva_ray.data.dataset import UnusableData
from diffva_ray.data.encoding import quantise
from diffva_ray.data.images import BadImage, decode_mask, decode_square
from diffva_ray.model import text
from diffva_ray.model.card import CONTROLNETS
from diffva_ray.model.image_conditioning import reads_image
from diffva_ray.train.denoiser import NoisePrediction
from diffva_ray.train.sampling import grey
from diffva_ray.train.stage import StageContext, Trainable, Worker

EMBEDDING = (16, 32, 96, 256)  # channels, as in Stable Diffusion; each level but the first halves the side length


class ControlNetStage(NoisePrediction):
    """Trains the ControlNet alone; UNet, text encoder and autoencoder keep their weights."""

    config: ControlNetStageConfig

    def __init__(self, context: StageContext, config: ControlNetStageConfig) -> None:
        super().__init__(context, config)
        bundle = context.bundle
        if reads_image(bundle.unet):
            raise RecipeError(f"stage {config.name}: a model trained on pairs takes no ControlNet")
        torch.manual_seed(context.seed)
        halvings = len(bundle.vae.config.block_out_channels) - 1  # from image size to latent size
        self.controlnet = ControlNetModel.from_unet(
            bundle.unet, conditioning_embedding_out_channels=EMBEDDING[: halvings + 1], load_weights_from_unet=False
        )
        self.controlnet.register_to_config(conditions=list(config.conditions))
        self.column = next(iter(own_columns(config.conditions)), "")  # of the user's own images
        if self.column:
            self._check_own()
        name = next((name for name in CONTROLNETS if name not in bundle.extras), None)
        if name is None:
            raise RecipeError(f"stage {config.name}: a model has at most {len(CONTROLNETS)} ControlNets")
        bundle.extras[name] = self.controlnet
        self.modules = {name: self.controlnet}
        network = Controlled(bundle.unet, bundle.text_encoder, self.controlnet)
        self.trainables = [Trainable("controlnet", network, self.inputs, self.loss, shardable=True)]
        self._conditions: dict[int, NDArray[np.uint8]] = {}  # by image index; computed ones have a bit for each value
        bits = 3 * context.images.size**2 * (8 if self.column else 1)
        self.kept = len(context.images.images) * bits / 8 <= context.cache_megabytes * 2**20

    def _check_own(self) -> None:
        """Raise for a data set without condition images, and for a validation, whose images have none."""
        images, recipe = self.context.images.images, self.context.bundle.recipe
        used = [image for image in images if self.config.classes.get(image.label, not self.config.classes)]
        lacking = [image.path for image in used if not image.columns.get(self.column)]
        if lacking:
            raise UnusableData(
                f"stage {self.config.name}: {len(lacking)} of {len(used)} images have none in column {self.column} "
                f"(first: {lacking[0]}); name one for each in the table of --data"
            )
        if recipe.train.validation.every and recipe.generate.method == "controlnet":
            raise RecipeError(
                f"stage {self.config.name}: images of the validation have no {self.column}; set "
                "train.validation.every=0, or another generate.method"
            )

    def start(self) -> None:
        """Copy the first half of the UNet, as earlier stages have trained it, into the ControlNet. Its output layers
        are zero, so that it changes nothing yet."""
        unet = self.context.bundle.unet
        for name in ("conv_in", "time_embedding", "encoder_hid_proj", "down_blocks", "mid_block"):
            source, target = getattr(unet, name, None), getattr(self.controlnet, name, None)
            if source is not None and target is not None:
                target.load_state_dict(source.state_dict(), strict=False)

    def begin(self, worker: Worker) -> None:
        self.controlnet.requires_grad_(True)

    def further(self, indices: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """Return the condition images [n, 3, H, W] in [0, 1]."""
        return (torch.stack([self._condition(index) for index in indices]),)

    def _condition(self, index: int) -> torch.Tensor:
        size = self.context.images.size
        values = self._conditions.get(index)
        if values is None:
            values = quantise(self._own(index)) if self.column else np.packbits(self._draw(index).astype(bool))
            if self.kept:
                self._conditions[index] = values
        if self.column:
            return grey(torch.from_numpy(values))
        return torch.from_numpy(np.unpackbits(values).reshape(3, size, size).astype(np.float32))

    def _own(self, index: int) -> NDArray[np.float32]:
        """The user's condition image of an image. Raises UnusableData, and a repeated training then continues."""
        images = self.context.images
        image = images.images[index]
        path = image.columns[self.column]
        try:
            shape = decode_square(images.store.read(image.path), images.size, bits=images.bits)[1]
            values = decode_condition(images.store.read(path), images.size, shape)
            return np.ascontiguousarray(values[..., ::-1]) if image.mirrored else values
        except (OSError, BadImage) as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else error
            raise UnusableData(f"stage {self.config.name}: condition image {path} ({self.column}): {reason}") from None

    def _draw(self, index: int) -> NDArray[np.float32]:
        images = self.context.images
        image = images.images[index]
        try:
            lungs = decode_mask(images.store.read(image.lung_mask), images.size) if image.lung_mask else None
            lungs = lungs[:, ::-1] if lungs is not None and image.mirrored else lungs
        except (OSError, BadImage):
            lungs = None  # ``condition`` then segments the lungs itself
        return condition(images.batch([index])[0].numpy(), lungs, self.config.conditions)


class Controlled(nn.Module):
    """UNet, text encoder and ControlNet behind one forward."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module, controlnet: nn.Module) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.controlnet = unet, text_encoder, controlnet

    def forward(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        ids: torch.Tensor,
        mask: torch.Tensor,
        which: torch.Tensor,
        image: torch.Tensor,
    ) -> torch.Tensor:
        states = text.embed(self.text_encoder, ids, mask)[which]
        down, middle = self.controlnet(noisy, timesteps, states, image, return_dict=False)
        output: torch.Tensor = self.unet(
            noisy,
            timesteps,
            encoder_hidden_states=states,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample
        return output
