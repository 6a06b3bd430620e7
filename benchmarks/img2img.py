"""StableDiffusionImg2ImgPipeline as a user would call it: the reference of engine.py and gpu.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from numpy.typing import NDArray
from PIL import Image

from diffva_ray.model.bundle import Bundle
from diffva_ray.model.schedulers import schedule

PROMPT, GUIDANCE = "normal chest scan", 4.0
Images = NDArray[np.float32]  # grey [n, size, size] in [0, 1], quantised to 8 bits


def img2img(bundle: Bundle, device: str, dtype: str, steps: int, strength: float) -> Any:
    """Build the pipeline on the bundle's own networks, which move to the device and change dtype."""
    parts = {name: module.to(device, getattr(torch, dtype)).eval() for name, module in bundle.modules.items()}
    scheduler, _ = schedule("pndm-diffusers", bundle.scheduler, steps, strength)
    pipeline = StableDiffusionImg2ImgPipeline(
        **parts, tokenizer=bundle.tokenizer, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_img2img(
    pipeline: Any, images: Images, seeds: list[int], strength: float, steps: int, reconstructs: bool = False
) -> Images:
    """Generate counterfactuals of a batch, with one generator per image.

    With ``reconstructs`` the reconstructions are also computed, and discarded.
    """
    pictures = [Image.fromarray(np.round(image * 255).astype(np.uint8)).convert("RGB") for image in images]
    if reconstructs:
        reconstruct(pipeline, pictures)
    return pipeline(
        prompt=[PROMPT] * len(pictures), image=pictures, strength=strength, guidance_scale=GUIDANCE,
        num_inference_steps=steps, output_type="np",
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    ).images.mean(axis=-1)  # fmt: skip


@torch.inference_mode()
def reconstruct(pipeline: Any, pictures: list[Image.Image]) -> Images:
    """Encode and decode the images: the reconstructions."""
    vae = pipeline.vae
    pixels = pipeline.image_processor.preprocess(pictures).to(vae.device, vae.dtype)
    decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
    return pipeline.image_processor.postprocess(decoded, output_type="np").mean(axis=-1)
