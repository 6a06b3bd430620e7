"""The counterfactual engine: images in, healthy counterfactuals out, in batches of one fixed shape.

An image's result depends on the image, its prompt, the settings and its seed alone, not on the batch: its noise comes
from its own CPU generator, every network call has the full micro-batch's shape (the last batch is padded), and each
prompt is embedded by itself.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffva_ray.config.methods import METHODS
from diffva_ray.config.prompts import texts_of
from diffva_ray.config.recipe import GUESS, SOURCE, GenerateConfig
from diffva_ray.config.sampling import SamplingSettings
from diffva_ray.counterfactual.composition import embedded
from diffva_ray.counterfactual.controlnet import columns_read
from diffva_ray.counterfactual.exact_device import exact_device, gpu_name
from diffva_ray.counterfactual.guess import guess
from diffva_ray.counterfactual.latent_diffusion import Edit, LatentDiffusion, noise, speed_up_doubling
from diffva_ray.counterfactual.methods import GENERATE
from diffva_ray.data.images import to_square
from diffva_ray.data.place_words import place_mask, without_place
from diffva_ray.model import text
from diffva_ray.model.bundle import Bundle, load
from diffva_ray.model.card import UnusableModel
from diffva_ray.progress import Stopwatch


@dataclass(frozen=True)
class Blend:
    """A prompt between two others: the linear mixture of their embeddings."""

    first: str  # prompt at weight 0
    second: str  # prompt at weight 1
    weight: float  # of the second prompt, in [0, 1]


@dataclass(frozen=True)
class CounterfactualBatch:
    """Result of a call for n images; arrays are grey float32 [n, size, size] in [0, 1], with NaN where a network gave
    non-finite values."""

    counterfactuals: NDArray[np.float32]  # the healthy counterfactuals
    # The method's output without an edit: D(E(image)) where it uses the autoencoder. Compensated maps are made of it.
    reconstructions: NDArray[np.float32]
    # The prompt that each image was taken to show; "" where the recipe names none or the model takes it for healthy.
    source_prompts: list[str]
    # Whether the networks ran in float32, because ``config.dtype`` gave values that are not finite.
    in_float32: list[bool]


def device_kind(name: str | None = None) -> str:
    """``name`` if one is given, else ``cuda`` where there is a GPU and ``cpu`` elsewhere."""
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def check_image(image: object, name: str) -> None:
    """Raise ValueError unless ``image`` is a float array [H, W] in [0, 1]."""
    if not isinstance(image, np.ndarray) or image.ndim != 2 or not np.issubdtype(image.dtype, np.floating):
        given = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"{name}: an image is a float array [H, W] in [0, 1], got {given}; see read_image")
    if not (image.min() >= 0 and image.max() <= 1):  # also refuses NaN
        given = f"{image.min():g} to {image.max():g}"
        raise ValueError(f"{name}: values are in [0, 1], got {given}; divide 8-bit ones by 255")


class CounterfactualEngine:
    """A model that generates counterfactuals of images.

    The engine takes the bundle over in place: networks move to the device, change dtype and memory layout, and their
    upsamplers are replaced. The bundle can then be neither saved nor trained; load the model again, or copy it first.
    On a CPU, ``config.cpu_threads`` becomes torch's number of threads in every thread that calls the engine, because it
    changes pixels. Only one thread may call it at a time.

    Args:
        bundle: The networks of a model folder, from ``model.bundle.load``.
        config: Recipe section ``generate``; by default that of the model's own recipe.
        device: ``cpu`` or ``cuda``; by default the GPU where there is one.

    Attributes:
        size: Side of the model's square images, in pixels.
        config: Recipe section ``generate`` in use.

    Examples:
        >>> from diffva_ray.data.phantoms import phantom
        >>> engine = CounterfactualEngine.from_pretrained("runs/demo/model")
        >>> image = phantom("COVID", patient=7, size=engine.size).image
        >>> batch = engine([image], seeds=[0], prompts=["normal chest scan"])
        >>> batch.counterfactuals.shape == (1, engine.size, engine.size)
        True
    """

    def __init__(self, bundle: Bundle, config: GenerateConfig | None = None, device: str | None = None) -> None:
        self.bundle = bundle
        self.config = config or bundle.recipe.generate
        self.device = torch.device(device_kind(device))
        dtype = getattr(torch, self.config.dtype)
        self._set_threads()
        exact_device()
        for module in bundle.modules.values():
            speed_up_doubling(module)  # sums kernels, so before they are rounded to ``dtype``
            # Each prompt is embedded once, so the text encoder gains no time by a smaller dtype.
            kept = torch.float32 if module is bundle.text_encoder else dtype
            module.to(self.device, kept).to(memory_format=torch.channels_last).eval().requires_grad_(False)
        self.watch = Stopwatch(torch.cuda.synchronize) if self.device.type == "cuda" else Stopwatch()
        self.model = LatentDiffusion(bundle, self.watch)
        self.size = bundle.recipe.model.resolution
        self._embeddings: dict[str, torch.Tensor] = {}

    @classmethod
    def from_pretrained(cls, model: str, device: str | None = None) -> CounterfactualEngine:
        """Load a model with its own recipe.

        Args:
            model: Model folder, or an address such as ``s3://bucket/model``.
            device: ``cpu`` or ``cuda``; by default the GPU where there is one.

        Returns:
            The engine, ready for calls.

        Raises:
            UnusableModel: If there is no model, or it cannot be loaded.
            StoreError: If the store fails.
        """
        return cls(load(model), device=device)

    def compile(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile the networks by ``torch.compile``, for many images: the first call then takes minutes.

        Args:
            backend: torch's name of the compiler, or the compiler itself.

        Raises:
            ValueError: If there is no C++ compiler, or this torch selects kernels by timing only (before 2.10, CUDA).
        """
        if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
            raise ValueError("torch.compile needs a C++ compiler, and there is none on this machine")
        if self.device.type == "cuda":
            from torch._inductor import config as inductor  # takes a second to import

            if not hasattr(inductor, "deterministic"):
                raise ValueError("this torch selects kernels by timing; install torch 2.10 or later")
            inductor.deterministic = True  # else two actors could sum in different orders
        self.model.compile(backend)

    @property
    def device_name(self) -> str:
        """GPU and its libraries, or the CPU's architecture and vector instructions, which decide how results round."""
        if self.device.type == "cuda":
            return gpu_name(self.device)
        return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"

    @property
    def settings(self) -> SamplingSettings:
        """The recipe's sampling settings."""
        return self.config.sampling

    def fits(self, prompt: str) -> bool:
        """Whether each text of the prompt fits the model's limit of tokens."""
        return all(text.fits(self.bundle.tokenizer, part) for part in texts_of(prompt))

    @torch.inference_mode()
    def embed(self, prompt: str | Blend) -> torch.Tensor:
        """Text embedding [1, length, width] of one prompt; cached."""
        if isinstance(prompt, Blend):
            return torch.lerp(self.embed(prompt.first), self.embed(prompt.second), prompt.weight)
        if prompt not in self._embeddings:
            ids, mask = text.tokenize(self.bundle.tokenizer, [prompt])
            self._embeddings[prompt] = text.embed(self.bundle.text_encoder, ids.to(self.device), mask.to(self.device))
        return self._embeddings[prompt]

    def condition_columns(self, settings: SamplingSettings | None = None) -> list[str]:
        """Name the condition images that a call needs for every image.

        Args:
            settings: Sampling settings; by default those of the recipe.

        Returns:
            Columns ``condition.NAME`` of the ControlNets in use; none for methods without a ControlNet.

        Raises:
            UnusableModel: If the model lacks the ControlNet, or has another number of them than there are weights.
        """
        method = METHODS[(settings or self.settings).method]
        return columns_read(self.bundle, self.config.controlnet) if method.needs == "controlnet" else []

    @torch.inference_mode()
    def __call__(
        self,
        images: Sequence[NDArray[np.float32]],
        seeds: Sequence[int],
        prompts: Sequence[str | Blend] | None = None,
        settings: SamplingSettings | None = None,
        lungs: Sequence[NDArray[np.bool_] | None] | None = None,
        conditions: Sequence[Mapping[str, NDArray[np.float32]]] | None = None,
    ) -> CounterfactualBatch:
        """Generate the counterfactuals of n images, at most ``config.micro_batch``.

        An image's counterfactual depends on the image, its prompt, the settings and its seed alone, not on the batch.

        Args:
            images: Grey float images [H, W] in [0, 1], of any size; each is squashed to the model's square.
            seeds: Seeds of the noise, one per image.
            prompts: What the counterfactuals should show, one per image; by default the recipe's healthy prompt.
            settings: Sampling settings of all images; by default those of the recipe.
            lungs: Lung masks, bool [size, size] or None, one per image; None counts as lungs everywhere.
            conditions: Condition images, float [3, size, size] in [0, 1] by column (see ``condition_columns``), one
                mapping per image.

        Returns:
            Counterfactuals, reconstructions and source prompts of the n images.

        Raises:
            ValueError: If arguments differ in length or have the wrong shape or range, the method cannot use the
                scheduler, or a prompt exceeds the model's tokens.
            UnusableModel: If the model lacks a network that the method needs, or the network reads condition images
                that are not given.
        """
        if (isinstance(images, np.ndarray) and images.ndim == 2) or isinstance(prompts, str):
            raise ValueError("images, seeds and prompts are lists, with one of each for every image")
        count, full = len(images), self.config.micro_batch
        if not 1 <= count <= full:
            raise ValueError(f"a call takes 1 to {full} images (config.micro_batch), got {count}")
        settings = settings or self.settings
        prompts = [self.bundle.recipe.data.healthy_prompt] * count if prompts is None else prompts
        self._check(images, seeds, prompts, lungs)
        self._set_threads()
        if settings.scheduler != (only := METHODS[settings.method].scheduler or settings.scheduler):
            raise ValueError(f"method {settings.method} runs with scheduler {only}, not {settings.scheduler}")
        columns = self._check_conditions(settings, count, conditions or ())
        masks: Sequence[NDArray[np.bool_] | None] = [None] * count if lungs is None else lungs
        own = [{column: one[column] for column in columns} for one in conditions or [{}] * count]
        batch = self._run(images, seeds, prompts, settings, masks, own, full)
        return self._repaired(batch, images, seeds, prompts, settings, masks, own)

    def _set_threads(self) -> None:
        """Set torch's number of threads for the thread that calls: torch starts each one with all cores."""
        if self.device.type == "cpu":
            torch.set_num_threads(self.config.cpu_threads)

    def _repaired(
        self,
        batch: CounterfactualBatch,
        images: Sequence[NDArray[np.float32]],
        seeds: Sequence[int],
        prompts: Sequence[str | Blend],
        settings: SamplingSettings,
        lungs: Sequence[NDArray[np.bool_] | None],
        conditions: Sequence[Mapping[str, NDArray[np.float32]]],
    ) -> CounterfactualBatch:
        """The batch, with images that a smaller dtype could not represent generated again, one by one, in float32."""
        finite = np.isfinite(batch.counterfactuals) & np.isfinite(batch.reconstructions)
        broken = np.flatnonzero(~finite.all(axis=(1, 2)))
        if self.config.dtype == "float32" or not broken.size:
            return batch
        networks = (self.bundle.unet, self.bundle.vae)
        dtype = getattr(torch, self.config.dtype)
        eager = torch.compiler.set_stance("force_eager") if self.model.compiled else nullcontext()
        try:
            for network in networks:
                network.float()  # exact, and so is the way back
            with eager:
                for i in broken.tolist():
                    one = self._run([images[i]], [seeds[i]], [prompts[i]], settings, [lungs[i]], [conditions[i]], 1)
                    batch.counterfactuals[i], batch.reconstructions[i] = one.counterfactuals[0], one.reconstructions[0]
                    batch.source_prompts[i], batch.in_float32[i] = one.source_prompts[0], True
        finally:
            for network in networks:
                network.to(dtype)
        return batch

    def _run(
        self,
        images: Sequence[NDArray[np.float32]],
        seeds: Sequence[int],
        prompts: Sequence[str | Blend],
        settings: SamplingSettings,
        lungs: Sequence[NDArray[np.bool_] | None],
        conditions: Sequence[Mapping[str, NDArray[np.float32]]],
        full: int,
    ) -> CounterfactualBatch:
        """Generate the counterfactuals of n images in a batch of ``full`` images."""
        count = len(images)

        # Pad the batch to its full shape with copies of the first image.
        slots = [*range(count), *[0] * (full - count)]
        squares = torch.from_numpy(np.stack([to_square(images[i], self.size) for i in slots])).to(self.device)
        everywhere = np.ones((self.size, self.size), np.bool_)
        masks = [everywhere if (mask := lungs[i]) is None else mask for i in slots]
        asked = [prompts[i] for i in slots]
        if settings.method == "masked" and self.config.masked.source == "place":
            texts = [prompt if isinstance(prompt, str) else "" for prompt in asked]
            masks = [place_mask(words, mask) for words, mask in zip(texts, masks, strict=True)]
            asked = [without_place(prompt) if isinstance(prompt, str) else prompt for prompt in asked]
        generators = [torch.Generator("cpu").manual_seed(seeds[i]) for i in slots]
        own = {name: np.stack([conditions[i][name] for i in slots]) for name in conditions[0]}

        # Encode.
        mean, std = self.model.encode(squares)
        latents = mean
        if self.config.posterior == "sample":  # as in diffusers, the posterior is sampled before the method's noise
            latents = mean + std * noise(mean.shape, generators).to(mean)
        latents = latents.float() * self.model.scale

        # Prompts of the image itself and of the unconditional branch.
        sources = self._source_prompts(latents, [seeds[i] for i in slots])
        negatives = sources if self.config.negative_prompt == SOURCE else [self.config.negative_prompt] * full

        # Edit by the chosen method, and drop the padding.
        prompt, further = embedded(asked, self.embed, settings)
        request = Edit(
            images=squares,
            lungs=torch.from_numpy(np.stack(masks)).to(self.device),
            latents=latents,
            generators=generators,
            prompt=prompt,
            further=further,
            negative=torch.cat([self.embed(prompt) for prompt in negatives]),
            empty=self.embed("").expand(full, -1, -1),
            source=torch.cat([self.embed(prompt) for prompt in sources]),
            settings=settings,
            config=self.config,
            conditions={name: torch.from_numpy(stack).to(self.device) for name, stack in own.items()},
        )
        generated = GENERATE[settings.method](self.model, request)
        return CounterfactualBatch(
            generated.counterfactuals[:count].cpu().numpy(),
            generated.reconstructions[:count].cpu().numpy(),
            sources[:count],
            [False] * count,
        )

    def _check(
        self,
        images: Sequence[NDArray[np.float32]],
        seeds: Sequence[int],
        prompts: Sequence[str | Blend],
        lungs: Sequence[NDArray[np.bool_] | None] | None,
    ) -> None:
        # One of each for every image.
        counts = {"images": len(images), "seeds": len(seeds), "prompts": len(prompts)}
        counts |= {} if lungs is None else {"lungs": len(lungs)}
        if len(set(counts.values())) > 1:
            given = ", ".join(f"{count} {name}" for name, count in counts.items())
            raise ValueError(f"a call takes one of each for every image, got {given}")

        # Type, shape and range of images and masks.
        for number, image in enumerate(images):
            check_image(image, f"image {number}")
        square = (self.size, self.size)
        for mask in lungs or ():
            if mask is not None and mask.shape != square:
                raise ValueError(f"a lung mask is {list(square)}, as the model's square, got {list(mask.shape)}")

        # Prompts that the model reads whole.
        for prompt in {prompt for prompt in prompts if isinstance(prompt, str)}:
            if not self.fits(prompt):
                limit = self.bundle.tokenizer.model_max_length
                raise ValueError(f"prompt {prompt!r}: more than the {limit} tokens that this model reads")

    def _check_conditions(
        self, settings: SamplingSettings, count: int, conditions: Sequence[Mapping[str, NDArray[np.float32]]]
    ) -> list[str]:
        """The columns of the condition images in use. Raises UnusableModel unless every image has all of them."""
        columns, shape = self.condition_columns(settings), (3, self.size, self.size)
        for column in columns:
            given = [one[column].shape for one in conditions if column in one]
            if len(given) != count:
                raise UnusableModel(
                    f"method {settings.method}: the model's ControlNet reads an image {column} for every X-ray, and "
                    f"{len(given)} of {count} have one; generate takes it from a table, explain from --condition"
                )
            if set(given) != {shape}:
                raise ValueError(f"{column}: a condition image is {list(shape)}, as the model's square")
        return columns

    def _source_prompts(self, latents: torch.Tensor, seeds: list[int]) -> list[str]:
        """The prompt of what each image shows: the recipe's, or the model's guess among ``data.prompts``, those of the
        classes that the model was trained on. An image that the model takes for healthy is encoded under the empty
        prompt."""
        if self.config.source_prompt != GUESS:
            return [self.config.source_prompt] * len(latents)
        data = self.bundle.recipe.data
        labels = list(data.prompts)
        indices = guess(self.model, latents, [self.embed(data.prompt(label)) for label in labels], seeds)
        return ["" if labels[index] == data.healthy_class else data.prompt(labels[index]) for index in indices]
