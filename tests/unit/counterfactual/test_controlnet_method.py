"""Method ``controlnet``: equals diffusers' pipeline, and SDEdit where the ControlNet's output is zero."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetImg2ImgPipeline
from PIL import Image

from diffva_ray.config.generation import ControlNetConfig
from diffva_ray.config.recipe import Recipe
from diffva_ray.config.sampling import SamplingSettings
from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.data.conditions import condition
from diffva_ray.data.phantoms import phantom
from diffva_ray.model.bundle import Bundle, build, load
from diffva_ray.model.card import UnusableModel

PHANTOMS = [phantom(label, n, seed=1, size=32) for n, label in enumerate(["COVID", "Lung_Opacity", "Normal"])]
IMAGES = [np.round(each.image * 255).astype(np.float32) / 255 for each in PHANTOMS]
LUNGS = [each.lungs for each in PHANTOMS]
SETTINGS = SamplingSettings(
    method="controlnet",
    scheduler="ddim",
    strength=0.6,
    guidance_scale=3.0,
    num_inference_steps=10,
)


def untrained(bundle: Bundle) -> ControlNetModel:
    network = ControlNetModel.from_unet(bundle.unet, conditioning_embedding_out_channels=(8, 16, 16))
    network.register_to_config(conditions=["lungs", "edges"])
    return network


def randomised(bundle: Bundle) -> ControlNetModel:
    """A ControlNet whose zero-initialised layers hold random weights."""
    network = untrained(bundle)
    torch.manual_seed(3)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return network.eval()


def engine_with(bundle: Bundle, network: ControlNetModel, **options: float) -> CounterfactualEngine:
    bundle.extras["controlnet"] = network
    changes = {"controlnet": ControlNetConfig(**options), "posterior": "sample", "micro_batch": 3, "source_prompt": ""}
    return CounterfactualEngine(bundle, bundle.recipe.generate.model_copy(update=changes), "cpu")


def generate(engine: CounterfactualEngine, settings: SamplingSettings = SETTINGS) -> np.ndarray:
    return engine(IMAGES, [1, 2, 3], settings=settings, lungs=LUNGS).counterfactuals


def test_an_untrained_controlnet_is_sdedit(tiny: Recipe) -> None:
    engine = engine_with(build(tiny), untrained(build(tiny)))
    assert np.array_equal(generate(engine), generate(engine, SETTINGS.replace(method="sdedit")))


@pytest.mark.parametrize("options", [{"conditioning_scale": 0.0}, {"start": 1.0}, {"end": 0.0}])
def test_switched_off_it_is_sdedit(tiny: Recipe, options: dict[str, float]) -> None:
    bundle = build(tiny)
    off = generate(engine_with(bundle, randomised(bundle), **options))
    on = generate(engine_with(bundle, randomised(bundle)))
    assert np.array_equal(off, generate(engine_with(bundle, randomised(bundle)), SETTINGS.replace(method="sdedit")))
    assert not np.array_equal(off, on)


@pytest.mark.parametrize(
    ("guidance", "options"),
    [(3.0, {}), (0.5, {}), (3.0, {"conditioning_scale": 1.3, "start": 0.3, "end": 0.8})],
)
def test_it_is_the_controlnet_img2img_pipeline(tiny: Recipe, guidance: float, options: dict[str, float]) -> None:
    bundle = build(tiny)
    network = randomised(bundle)
    ours = generate(engine_with(bundle, network, **options), SETTINGS.replace(guidance_scale=guidance))
    pipeline = StableDiffusionControlNetImg2ImgPipeline(
        vae=bundle.vae,
        text_encoder=bundle.text_encoder,
        tokenizer=bundle.tokenizer,
        unet=bundle.unet,
        controlnet=network,
        scheduler=DDIMScheduler.from_config(
            bundle.scheduler, clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    chosen = ControlNetConfig(**options)
    theirs = pipeline(
        prompt=["normal chest scan"] * 3,
        image=[Image.fromarray(np.round(image * 255).astype(np.uint8)).convert("RGB") for image in IMAGES],
        control_image=torch.from_numpy(
            np.stack([condition(image, lungs, ("lungs", "edges")) for image, lungs in zip(IMAGES, LUNGS)])
        ),
        strength=SETTINGS.strength,
        guidance_scale=guidance,
        num_inference_steps=SETTINGS.num_inference_steps,
        controlnet_conditioning_scale=chosen.conditioning_scale,
        control_guidance_start=chosen.start,
        control_guidance_end=chosen.end,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2, 3)],
        output_type="pt",
    ).images
    assert np.abs(ours - theirs.mean(dim=1).numpy()).max() < 1e-5


def test_the_error_without_a_controlnet_names_the_training_stage(model: Path) -> None:
    with pytest.raises(UnusableModel, match="no controlnet; train it with a stage that `trains: controlnet`"):
        generate(CounterfactualEngine(load(str(model)), device="cpu"))
