"""What is measured: the networks, the product's engine on copies of them, and the sizes of the work."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from img2img import GUIDANCE, PROMPT
from numpy.typing import NDArray

from diffva_ray.config.recipe import Recipe, load_recipe
from diffva_ray.config.sampling import SamplingSettings
from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.data.phantoms import Phantom, phantom
from diffva_ray.model.bundle import Bundle, build
from gpu_sections import measure

FULL = str(Path(__file__).parents[1] / "sd14_random.yaml")
SMALL = (  # networks that any machine runs in milliseconds
    "model.resolution=32",
    "model.vae.block_out_channels=[8, 8, 16]",
    "model.vae.norm_num_groups=4",
    "model.unet.block_out_channels=[16, 32]",
    "model.unet.sample_size=8",
    "model.unet.norm_num_groups=8",
)
Images = NDArray[np.float32]


@dataclass(frozen=True)
class Sizes:
    """How much work the sections do. Numbers of images are of images: guidance makes two samples of each."""

    matrix: int = 8192
    copied_mib: int = 4096
    attention: tuple[int, int, int, int] = (16, 8, 4096, 40)
    convolutions: tuple[tuple[int, int, int], ...] = ((16, 320, 64), (8, 128, 512))  # batch, channels, side
    calls: int = 10
    small_images: int = 16  # of the small model
    small_steps: int = 30
    determinism_steps: int = 8
    unet_images: tuple[int, ...] = (8, 16, 32, 4, 1, 64)  # the most telling first
    vae_images: tuple[int, ...] = (8, 16, 1)
    image_batches: tuple[int, ...] = (8, 16)  # that pipeline and engine may choose from
    compiled_images: int = 8
    edits: tuple[tuple[float, int, int], ...] = ((0.55, 20, 1), (0.55, 75, 3))  # strength, steps, rounds
    records: int = 64
    micro_batches: tuple[int, ...] = (8, 32)
    worker_steps: tuple[int, ...] = (75, 20)
    training_batches: tuple[int, ...] = (16, 8, 2, 32)
    large_side: int = 1024  # of training images that are decoded in every step


TINY = Sizes(
    matrix=128, copied_mib=1, attention=(2, 2, 64, 40), convolutions=((2, 16, 8),), calls=3, small_images=2,
    small_steps=4, determinism_steps=4, unet_images=(2, 1), vae_images=(1,), image_batches=(1, 2), compiled_images=2,
    edits=((0.5, 4, 2), (0.5, 2, 1)), records=4, micro_batches=(2,), worker_steps=(4, 2), training_batches=(2,),
    large_side=64,
)  # fmt: skip


@dataclass
class Subject:
    """The networks (float32, on the CPU, as built), where they run, and in what dtype they are timed."""

    device: torch.device
    dtype: str
    tiny: bool
    sizes: Sizes
    bundle: Bundle
    scratch: Path
    model: str | None  # a trained small model's folder
    phantoms: list[Phantom]

    @classmethod
    def made(cls, device: str, dtype: str | None, tiny: bool, scratch: Path, model: str | None) -> Subject:
        recipe = load_recipe("phantom", SMALL) if tiny else load_recipe(FULL)
        dtype = dtype or ("float32" if tiny else recipe.generate.dtype)
        sizes = TINY if tiny else Sizes()
        side, count = recipe.model.resolution, 2 if tiny else 8
        made = [phantom(("COVID", "Lung_Opacity")[n % 2], n, 1, side) for n in range(count)]
        return cls(torch.device(device), dtype, tiny, sizes, build(recipe), scratch, model, made)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def recipe(self) -> Recipe:
        return self.bundle.recipe

    @property
    def latent_side(self) -> int:
        return self.recipe.model.resolution // self.bundle.latent_scale

    @property
    def text_shape(self) -> tuple[int, int]:
        return self.bundle.tokenizer.model_max_length, self.bundle.text_encoder.config.hidden_size

    def images(self, count: int) -> list[Images]:
        """Phantoms on 8 bits, which a pipeline takes as pictures; in turn where there are fewer."""
        made = [np.round(one.image * 255).astype(np.float32) / 255 for one in self.phantoms]
        return [made[n % len(made)] for n in range(count)]

    def random(self, *shape: int, dtype: str | None = None, seed: int = 0) -> torch.Tensor:
        """Standard normal numbers, drawn on the device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        made = torch.randn(*shape, generator=generator, device=self.device)
        return made.to(getattr(torch, dtype or self.dtype))

    @cached_property
    def resident(self) -> Bundle:
        """The networks in float32 on the device, for copies there: from the host each would take seconds."""
        bundle = copied(self.bundle)
        for module in bundle.modules.values():
            module.to(self.device).eval().requires_grad_(False)
        return bundle

    def copied(self) -> Bundle:
        """A copy of the networks, on the device, for somebody who changes them in place."""
        return copied(self.resident)

    def engine(self, dtype: str | None = None, bundle: Bundle | None = None, **changes: Any) -> CounterfactualEngine:
        """The product's engine on a copy of the networks."""
        bundle = bundle or self.copied()
        settings = {
            "dtype": dtype or self.dtype, "posterior": "sample", "source_prompt": "", "negative_prompt": "",
            "cpu_threads": 1, **changes,
        }  # fmt: skip
        return CounterfactualEngine(bundle, bundle.recipe.generate.model_copy(update=settings), self.device.type)


def copied(bundle: Bundle) -> Bundle:
    parts = {name: copy.deepcopy(module) for name, module in bundle.modules.items()}
    return replace(bundle, **parts, extras={})


def small_bundle(tiny: bool) -> Bundle:
    """The phantom recipe's networks with random weights, for what does not depend on their size."""
    return build(load_recipe("phantom", SMALL if tiny else ()))


def setting(method: str = "sdedit", scheduler: str = "pndm-diffusers", **changes: Any) -> SamplingSettings:
    values: dict[str, Any] = {"strength": 0.55, "guidance_scale": GUIDANCE, "num_inference_steps": 20, **changes}
    return SamplingSettings(method=method, scheduler=scheduler, **values)


def generate(
    engine: CounterfactualEngine,
    images: Sequence[Images],
    settings: SamplingSettings,
    seeds: Sequence[int] | None = None,
) -> tuple[Images, Images]:
    """Counterfactuals and reconstructions of images, in the engine's micro-batches."""
    seeds = list(range(len(images))) if seeds is None else list(seeds)
    size, made = engine.config.micro_batch, []
    for at in range(0, len(images), size):
        some = list(images[at : at + size])
        made.append(engine(some, seeds[at : at + size], [PROMPT] * len(some), settings))
    return tuple(  # type: ignore[return-value]
        np.concatenate([getattr(one, name) for one in made]) for name in ("counterfactuals", "reconstructions")
    )


def allow_compilations() -> None:
    """PyTorch stops to compile a function at its eighth shape or module; here every variant is one."""
    from torch._dynamo import config

    for name in ("cache_size_limit", "recompile_limit"):  # the old name and the new one
        if hasattr(config, name):
            setattr(config, name, 64)


def compiled(engine: CounterfactualEngine, tiny: bool) -> str:
    """Put the engine's networks through torch.compile, and say by which backend. Toy networks on a CPU are only traced
    (``aot_eager``): their C++ takes a minute to compile, and what is measured then is not a number anybody wants."""
    allow_compilations()
    backend = "aot_eager" if tiny and engine.device.type == "cpu" else "inductor"
    engine.compile(backend)
    return backend


def guidance_of(subject: Subject, dtype: str, count: int) -> Any:
    """What the product's ``LatentDiffusion.guided`` reads of a request: both prompts' embeddings and the scale."""
    prompt, negative = (subject.random(count, *subject.text_shape, dtype=dtype, seed=seed) for seed in (3, 4))
    return SimpleNamespace(
        prompt=prompt, negative=negative, further=(), settings=SimpleNamespace(guidance_scale=GUIDANCE)
    )


def operations_of(subject: Subject) -> dict[str, float]:
    """TFLOP of one sample through each network as it stands in the model, counted without computing anything."""
    bundle, side = subject.bundle, subject.latent_side
    pixels = subject.recipe.model.resolution
    with torch.device("meta"):
        unet, vae = (_meta(module) for module in (bundle.unet, bundle.vae))
        latents, text = torch.empty(1, 4, side, side), torch.empty(1, *subject.text_shape)
        calls: dict[str, Callable[[], Any]] = {
            "unet": lambda: unet(latents, torch.tensor(0), encoder_hidden_states=text),
            "encode": lambda: vae.encode(torch.empty(1, 3, pixels, pixels)),
            "decode": lambda: vae.decode(latents),
        }
        return {name: measure.operations(call) for name, call in calls.items()}


def _meta(module: Any) -> Any:
    with torch.device("meta"):
        return type(module).from_config(module.config)
