"""The counterfactual engine: images in, healthy counterfactuals out, in batches of one fixed shape.

A record's result depends on its own image, prompt, settings and seed alone: noise comes from a CPU generator of its
own, every network call has the micro-batch's full shape (the tail is padded), and a prompt is embedded by itself.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from diffva_ray.config.methods import METHODS
from diffva_ray.config.recipe import GUESS, SOURCE, GenerateConfig
from diffva_ray.counterfactual.guess import guess
from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion, noise, speed_up_doubling
from diffva_ray.data.images import to_square
from diffva_ray.model import text
from diffva_ray.model.bundle import Bundle, load
from diffva_ray.progress import Stopwatch


def method_of(name: str, scheduler: str) -> Callable[[LatentDiffusion, Edit], Generated]:
    """The ``generate`` function of a method's module. Raises ValueError for an unknown name, and for a scheduler that
    the method cannot run with."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; there are {', '.join(METHODS)}")
    if scheduler != (only := METHODS[name].scheduler or scheduler):
        raise ValueError(f"method {name} runs with scheduler {only}, not {scheduler}")
    return importlib.import_module(f"diffva_ray.counterfactual.{name.replace('-', '_')}").generate


@dataclass(frozen=True)
class Blend:
    """A prompt between two others: their embeddings mixed linearly, ``weight`` in [0, 1] of the second."""

    first: str
    second: str
    weight: float


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """The part of a record's settings that a sweep may vary."""

    prompt: str | Blend
    method: str
    scheduler: str
    strength: float
    guidance_scale: float
    num_inference_steps: int


@dataclass(frozen=True)
class CounterfactualBatch:
    """What a call returns for n images: grey images float32 [n, size, size] in [0, 1], NaN where a network gave
    non-finite values.

    ``counterfactuals``: the healthy counterfactuals. ``reconstructions``: what the method would have returned had it
    changed nothing (D(E(image)) where it goes through the autoencoder), of which compensated maps are made.
    ``source_prompts``: the prompt each image was taken to show; empty where the recipe names none or the image looks healthy
    to the model.
    """

    counterfactuals: NDArray[np.float32]
    reconstructions: NDArray[np.float32]
    source_prompts: list[str]


def device_kind(name: str | None = None) -> str:
    """``cuda`` or ``cpu``: the name asked for, or what there is."""
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


class CounterfactualEngine:
    """One model, ready to generate images: ``generate(images, settings, seeds)``.

        >>> from diffva_ray.data.phantoms import phantom
        >>> generate = CounterfactualEngine.from_pretrained("runs/demo/model")
        >>> image = phantom("COVID", patient=7, size=generate.size).image
        >>> counterfactuals = generate([image], [generate.settings("normal chest scan")], seeds=[0])
        >>> counterfactuals.counterfactuals.shape == (1, generate.size, generate.size)
        True

    ``size`` is the side of the model's square in pixels, ``config`` the recipe's section ``generate``. ``device``:
    ``cpu`` or ``cuda``, by default the GPU where there is one. On a CPU ``config.cpu_threads`` becomes torch's number
    of threads for the whole process, since it changes pixels.

    The bundle is taken over in place: its networks move to the device, change dtype and memory layout, and have their
    upsamplers rewritten, so it cannot be saved or trained afterwards. Load the model again for that, or copy first.
    """

    def __init__(self, bundle: Bundle, config: GenerateConfig | None = None, device: str | None = None) -> None:
        self.bundle = bundle
        self.config = config or bundle.recipe.generate
        self.device = torch.device(device_kind(device))
        dtype = getattr(torch, self.config.dtype)
        if self.device.type == "cpu":
            torch.set_num_threads(self.config.cpu_threads)  # thread counts change pixels
        torch.backends.cudnn.benchmark = False  # so do kernels chosen by a stopwatch
        for module in bundle.modules.values():
            module.to(self.device, dtype).to(memory_format=torch.channels_last).eval().requires_grad_(False)
            speed_up_doubling(module)
        self.watch = Stopwatch(torch.cuda.synchronize) if self.device.type == "cuda" else Stopwatch()
        self.model = LatentDiffusion(bundle, self.watch)
        self.size = bundle.recipe.model.resolution
        self._embeddings: dict[str, torch.Tensor] = {}

    @classmethod
    def from_pretrained(cls, model: str, device: str | None = None) -> CounterfactualEngine:
        """The model in a folder or at an address such as ``s3://bucket/model``, with its own recipe.

        Raises UnusableModel where there is none or it cannot be loaded, StoreError when the store fails.
        """
        return cls(load(model), device=device)

    def compile(self) -> None:
        """Put the networks through ``torch.compile``, for work on many images: the first call takes minutes. Raises
        ValueError, one line, where there is no compiler, or one that chooses kernels by a stopwatch."""
        if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
            raise ValueError("generate.compile: torch.compile needs a C++ compiler, and there is none on this machine")
        if self.device.type == "cuda":
            from torch._inductor import config as inductor  # here, since it takes a second

            if not hasattr(inductor, "deterministic"):
                raise ValueError("generate.compile: this torch chooses kernels by a stopwatch; take 2.10 or later")
            inductor.deterministic = True  # or two actors could sum in another order
        for network in (self.bundle.unet, self.bundle.vae.encoder, self.bundle.vae.decoder):
            network.compile(dynamic=False)  # a micro-batch has one shape
        self.model.compiled = True

    def settings(self, prompt: str | None = None) -> SamplingSettings:
        """The recipe's settings, with another prompt if one is given."""
        config = self.config
        return SamplingSettings(
            prompt=prompt if prompt is not None else self.bundle.recipe.data.healthy_prompt,
            method=config.method,
            scheduler=config.scheduler,
            strength=config.strength,
            guidance_scale=config.guidance_scale,
            num_inference_steps=config.num_inference_steps,
        )

    def fits(self, prompt: str) -> bool:
        """Whether the prompt fits the model's token length."""
        return text.fits(self.bundle.tokenizer, prompt)

    @torch.inference_mode()
    def embed(self, prompt: str | Blend) -> torch.Tensor:
        """Text embedding [1, length, width] of one prompt, computed once."""
        if isinstance(prompt, Blend):
            return torch.lerp(self.embed(prompt.first), self.embed(prompt.second), prompt.weight)
        if prompt not in self._embeddings:
            ids, mask = text.tokenize(self.bundle.tokenizer, [prompt])
            self._embeddings[prompt] = text.embed(self.bundle.text_encoder, ids.to(self.device), mask.to(self.device))
        return self._embeddings[prompt]

    @torch.inference_mode()
    def __call__(
        self,
        images: Sequence[NDArray[np.float32]],
        settings: Sequence[SamplingSettings],
        seeds: Sequence[int],
        lungs: Sequence[NDArray[np.bool_] | None] | None = None,
    ) -> CounterfactualBatch:
        """Generate n images, at most ``config.micro_batch``: grey [H, W] in [0, 1] of any size, squashed to the model's
        square. ``settings`` and ``seeds``: one for each image; ``lungs``: a mask [size, size] or None for each.

        All settings of a call agree but for the prompt. An image's counterfactual depends on the image, its prompt, the
        settings and its seed alone, not on its neighbours. Raises ValueError for settings that do not agree, unknown
        names, a prompt that the model would cut, and arguments of unequal lengths or shapes; UnusableModel where the
        method needs a network that the model has not.
        """
        if (isinstance(images, np.ndarray) and images.ndim == 2) or isinstance(settings, SamplingSettings):
            raise ValueError("images, settings and seeds are lists, with one of each for every image")
        count, full = len(images), self.config.micro_batch
        if not 1 <= count <= full:
            raise ValueError(f"a call takes 1 to {full} images (config.micro_batch), got {count}")
        self._check(images, settings, seeds, lungs)
        first = settings[0]
        method = method_of(first.method, first.scheduler)
        slots = [*range(count), *[0] * (full - count)]
        squares = torch.from_numpy(np.stack([to_square(images[i], self.size) for i in slots])).to(self.device)
        everywhere = np.ones((self.size, self.size), np.bool_)
        masks = [everywhere if lungs is None or (mask := lungs[i]) is None else mask for i in slots]
        generators = [torch.Generator("cpu").manual_seed(seeds[i]) for i in slots]
        prompts = [settings[i].prompt for i in slots]

        mean, std = self.model.encode(squares)
        latents = mean
        if self.config.posterior == "sample":  # diffusers draws the posterior first, then the noise
            latents = mean + std * noise(mean.shape, generators).to(mean)
        latents = latents.float() * self.model.scale
        sources = self._sources(latents, [seeds[i] for i in slots])
        negatives = sources if self.config.negative_prompt == SOURCE else [self.config.negative_prompt] * full
        request = Edit(
            images=squares,
            lungs=torch.from_numpy(np.stack(masks)).to(self.device),
            latents=latents,
            generators=generators,
            prompt=torch.cat([self.embed(prompt) for prompt in prompts]),
            negative=torch.cat([self.embed(prompt) for prompt in negatives]),
            source=torch.cat([self.embed(prompt) for prompt in sources]),
            scheduler=first.scheduler,
            strength=first.strength,
            guidance_scale=first.guidance_scale,
            num_inference_steps=first.num_inference_steps,
            config=self.config,
        )
        generated = method(self.model, request)
        counterfactuals, unchanged = (
            images[:count].cpu().numpy() for images in (generated.counterfactuals, generated.reconstructions)
        )
        return CounterfactualBatch(counterfactuals, unchanged, sources[:count])

    def _check(
        self,
        images: Sequence[NDArray[np.float32]],
        settings: Sequence[SamplingSettings],
        seeds: Sequence[int],
        lungs: Sequence[NDArray[np.bool_] | None] | None,
    ) -> None:
        counts = {"images": len(images), "settings": len(settings), "seeds": len(seeds)}
        counts |= {} if lungs is None else {"lungs": len(lungs)}
        if len(set(counts.values())) > 1:
            given = ", ".join(f"{count} {name}" for name, count in counts.items())
            raise ValueError(f"a call takes one of each for every image, got {given}")
        square = (self.size, self.size)
        for number, image in enumerate(images):
            if not isinstance(image, np.ndarray) or image.ndim != 2 or not np.issubdtype(image.dtype, np.floating):
                given = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
                raise ValueError(
                    f"image {number}: an image is a float array [H, W] in [0, 1], got {given}; see read_image"
                )
            if not (image.min() >= 0 and image.max() <= 1):  # NaN is neither
                given = f"{image.min():g} to {image.max():g}"
                raise ValueError(f"image {number}: values are in [0, 1], got {given}; divide 8-bit ones by 255")
        for mask in lungs or ():
            if mask is not None and mask.shape != square:
                raise ValueError(f"a lung mask is {list(square)}, as the model's square, got {list(mask.shape)}")
        if not 0 < settings[0].strength <= 1 or settings[0].num_inference_steps < 1:
            raise ValueError(
                f"strength is in (0, 1] and there is a step or more, got strength {settings[0].strength:g}, "
                f"{settings[0].num_inference_steps} steps"
            )
        if any(replace(other, prompt=settings[0].prompt) != settings[0] for other in settings):
            raise ValueError("the settings of one call may differ in the prompt only")
        for prompt in {setting.prompt for setting in settings if isinstance(setting.prompt, str)}:
            if not self.fits(prompt):
                limit = self.bundle.tokenizer.model_max_length
                raise ValueError(f"prompt {prompt!r}: more than the {limit} tokens that this model reads")

    def _sources(self, latents: torch.Tensor, seeds: list[int]) -> list[str]:
        """The prompt of what each image shows: the recipe's, or the model's guess among the classes it was trained on.
        An image that looks healthy to it is encoded under the empty prompt."""
        if self.config.source_prompt != GUESS:
            return [self.config.source_prompt] * len(latents)
        data = self.bundle.recipe.data
        labels = list(data.prompts)
        found = guess(self.model, latents, [self.embed(data.prompt(label)) for label in labels], seeds)
        return ["" if labels[index] == data.healthy_class else data.prompt(labels[index]) for index in found]
