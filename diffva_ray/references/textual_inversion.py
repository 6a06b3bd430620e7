"""Textual inversion (Gal et al. 2022, "An image is worth one word"; method ``textual-inversion``), the alternative to
fine-tuning that the paper names: UNet, text encoder and autoencoder stay as they are, and a vector in the place of a
word's embedding is learnt for each class by the denoising loss (their equation 2),

    v* = argmin_v E |eps - eps(z_t, t, encoder("v scan"))|^2.

A counterfactual is DDIM inversion under the empty prompt and guidance to the healthy vector. It needs a base model that
can draw chest X-rays at all.

Differences: one neutral sentence instead of the authors' templates; a vector starts from the mean embedding of its
class's prompt instead of one coarse word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import DDPMScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn
from torch.nn import functional

from diffva_ray.config.reference_stages import TextualInversionConfig
from diffva_ray.counterfactual.ddim_inversion import invert
from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion
from diffva_ray.model import text
from diffva_ray.train.latents import latents_of
from diffva_ray.train.sampling import ImageOrder
from diffva_ray.train.stage import Batch, Inputs, Stage, StageContext, Trainable, Worker

SENTENCE, PLACE = "chest scan", 1  # the vector replaces its first word, which follows the start token


class ConceptVectors(ModelMixin, ConfigMixin):
    """A vector [width] for each of ``classes``."""

    @register_to_config  # type: ignore[untyped-decorator]  # of diffusers
    def __init__(self, classes: Sequence[str], width: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of diffusers
        self.vectors = nn.Parameter(torch.zeros(len(classes), width))

    def forward(self, which: torch.Tensor) -> torch.Tensor:
        """Vectors [n, width] of class indices [n]."""
        return self.vectors[which]


def generate(model: LatentDiffusion, request: Edit) -> Generated:
    """Edit a batch; prompts have no effect. Raises UnusableModel for a model without vectors."""
    concepts = model.bundle.extra("textual_inversion").to(request.latents.device).eval().requires_grad_(False)
    index = list(concepts.config.classes).index(model.bundle.recipe.data.healthy_class)
    healthy = sentence(model.bundle, concepts.vectors[index : index + 1]).expand(len(request.latents), -1, -1)
    own = replace(request, prompt=healthy, source=request.empty, negative=request.empty, further=())
    scheduler, timesteps = model.schedule(own)
    return model.generated(model.denoise(invert(model, own, timesteps), own, scheduler, timesteps), own)


def sentence(bundle: Any, vectors: torch.Tensor) -> torch.Tensor:
    """Embeddings [n, length, width] of SENTENCE with each of ``vectors`` [n, width] at PLACE."""
    ids, mask = (part.to(vectors.device).expand(len(vectors), -1) for part in _tokens(bundle))
    with _replaced(bundle.text_encoder, vectors):
        return text.embed(bundle.text_encoder, ids, mask)


def _tokens(bundle: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return text.tokenize(bundle.tokenizer, [SENTENCE])


@contextmanager
def _replaced(encoder: Any, vectors: torch.Tensor) -> Iterator[None]:
    def hook(module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.cat([output[:, :PLACE], vectors[:, None].to(output), output[:, PLACE + 1 :]], dim=1)

    handle = encoder.get_input_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class TextualInversionStage(Stage):
    """Learns the vectors, on latents; follows the stages of autoencoder and denoiser, if there are any."""

    config: TextualInversionConfig

    def __init__(self, context: StageContext, config: TextualInversionConfig) -> None:
        super().__init__(context, config)
        bundle = context.bundle
        self.order = ImageOrder(context.images.images, config.classes, context.seed)
        self.latents = latents_of(context, context.images)
        self.noise_scheduler = DDPMScheduler.from_config(bundle.scheduler)
        self.classes = sorted(self.order.members)
        width = bundle.text_encoder.get_input_embeddings().weight.shape[1]
        self.concepts: Any = ConceptVectors(self.classes, width)
        bundle.extras["textual_inversion"] = self.concepts
        self.modules = {"textual_inversion": self.concepts}
        self.trainables = [Trainable("vectors", self.concepts, self.inputs, self.loss)]

    def start(self) -> None:
        """Set each vector to the mean embedding of the words of its class's prompt."""
        bundle, words = self.context.bundle, self.context.bundle.text_encoder.get_input_embeddings().weight
        for row, label in enumerate(self.classes):
            ids, mask = text.tokenize(bundle.tokenizer, [bundle.recipe.data.prompt(label)])
            inner = ids[0, 1 : max(2, int(mask.sum()) - 1)].to(words.device)
            self.concepts.vectors.data[row] = words[inner].detach().mean(0).to(self.concepts.vectors)

    def begin(self, worker: Worker) -> None:
        self.concepts.requires_grad_(True)
        self.context.bundle.text_encoder.eval()
        self.ids, self.mask = (part.to(worker.device) for part in _tokens(self.context.bundle))

    def fill(self, device: torch.device) -> None:
        self.latents.fill(device)

    def inputs(self, batch: Batch) -> Inputs:
        """Return the images, noise, timesteps and class indices of a share."""
        indices = [self.order[position] for position in batch.positions()]
        labels = [self.context.images.images[index].label for index in indices]
        random, shape = batch.random, self.latents.shape
        return {
            "images": self.latents.inputs(indices),
            "posterior_noise": random.normal(*shape),
            "noise": random.normal(*shape),
            "timesteps": random.integers(self.noise_scheduler.config.num_train_timesteps),
            "which": torch.tensor([self.classes.index(label) for label in labels]),
        }

    def loss(self, network: nn.Module, inputs: Inputs) -> torch.Tensor:
        bundle, noise, timesteps = self.context.bundle, inputs["noise"], inputs["timesteps"]
        mean, std = self.latents.moments(inputs["images"])
        latents = (mean + std * inputs["posterior_noise"]) * bundle.vae.config.scaling_factor
        noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)
        vectors = network(inputs["which"])
        with _replaced(bundle.text_encoder, vectors):
            ids, mask = self.ids.expand(len(vectors), -1), self.mask.expand(len(vectors), -1)
            states = text.embed(bundle.text_encoder, ids, mask)
        output = bundle.unet(noisy, timesteps, encoder_hidden_states=states).sample
        predicts_velocity = self.noise_scheduler.config.prediction_type == "v_prediction"
        target = self.noise_scheduler.get_velocity(latents, noise, timesteps) if predicts_velocity else noise
        return functional.mse_loss(output.float(), target)
