"""Stage ``controlnet``: trains a ControlNet beside the frozen model (Zhang et al. 2023; the paper's equation 7) to
predict noise from the prompt and a condition image of lungs and edges."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import ControlNetModel
from numpy.typing import NDArray
from torch import nn

from diffva_ray.config.recipe import RecipeError
from diffva_ray.config.stages import ControlNetStageConfig
from diffva_ray.data.conditions import condition
from diffva_ray.data.images import BadImage, decode_mask
from diffva_ray.model import text
from diffva_ray.model.image_conditioning import reads_image
from diffva_ray.train.denoiser import NoisePrediction
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
        bundle.extras["controlnet"] = self.controlnet
        self.modules = {"controlnet": self.controlnet}
        network = Controlled(bundle.unet, bundle.text_encoder, self.controlnet)
        self.trainables = [Trainable("controlnet", network, self.inputs, self.loss, shardable=True)]
        self._conditions: dict[int, NDArray[np.uint8]] = {}  # by image index; one bit for each pixel
        size = context.images.size
        self.kept = len(context.images.images) * 3 * size**2 / 8 <= context.cache_megabytes * 2**20

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
        """Return the condition images [n, 3, H, W], in {0, 1}."""
        return (torch.stack([self._condition(index) for index in indices]),)

    def _condition(self, index: int) -> torch.Tensor:
        size = self.context.images.size
        bits = self._conditions.get(index)
        if bits is None:
            bits = np.packbits(self._draw_condition(index).astype(bool))
            if self.kept:
                self._conditions[index] = bits
        return torch.from_numpy(np.unpackbits(bits).reshape(3, size, size).astype(np.float32))

    def _draw_condition(self, index: int) -> NDArray[np.float32]:
        images = self.context.images
        image = images.images[index]
        try:
            lungs = decode_mask(images.store.read(image.lung_mask), images.size) if image.lung_mask else None
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
