"""DreamBooth's class set, drawn by the model itself: the option that the paper's script takes where no images are
named.

A base with a swapped text encoder cannot follow a prompt before it is trained (its cross-attention knows another
encoder), so a base draws with its own encoder; a model from scratch draws as it stands when the stage begins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from diffva_ray.config.stages import DenoiserConfig
from diffva_ray.data.dataset import Dataset, LabelledImage
from diffva_ray.data.encoding import encode_grey, quantise
from diffva_ray.model.bundle import base_source, pipeline_of
from diffva_ray.train.sampling import ImageSet
from diffva_ray.train.stage import StageContext

STEPS, GUIDANCE = 50, 7.5  # the pipeline's defaults, as in diffusers' script


def class_images(
    context: StageContext, config: DenoiserConfig, device: torch.device, first: bool, wait: Callable[[], None]
) -> ImageSet:
    """``num_class_images`` images of ``prior_class`` below ``.train/class_images`` of the model folder: those that are
    missing are drawn by the first worker, each from a seed of its own, so that a resumed training has the same set."""
    data, label = context.bundle.recipe.data, str(config.prior_class)
    folder = f".train/class_images/{config.name}"
    names = [f"{folder}/{n:05d}.png" for n in range(config.num_class_images)]
    if first:
        there = {name for name, _ in context.store.list(folder)}
        missing = [n for n, name in enumerate(names) if name not in there]
        if missing:
            pipeline = _pipeline(context, device)
            for n in missing:
                generator = torch.Generator("cpu").manual_seed(context.seed * 1_000_003 + n)
                image = pipeline(
                    data.prompt(label),
                    height=context.images.size,
                    width=context.images.size,
                    num_inference_steps=STEPS,
                    guidance_scale=GUIDANCE,
                    generator=generator,
                    output_type="np",
                ).images[0]
                context.store.put(names[n], encode_grey(quantise(image.mean(axis=2))))
            del pipeline
    wait()
    dataset = Dataset(context.store, [LabelledImage(name, label) for name in names], "class images")
    return ImageSet(dataset, context.images.size, context.cache_megabytes)


def _pipeline(context: StageContext, device: torch.device) -> Any:
    base = context.bundle.recipe.model.base
    if base is None:
        pipeline = pipeline_of(context.bundle)
    else:
        source = base_source(base)
        pipeline = StableDiffusionPipeline.from_pretrained(
            source, safety_checker=None, requires_safety_checker=False, use_safetensors=True
        ).to(device)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
