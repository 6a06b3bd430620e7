"""The engine: equals diffusers' pipeline, and an image's result does not depend on its batch."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionImg2ImgPipeline
from PIL import Image

from diffva_ray.config.recipe import Recipe
from diffva_ray.config.sampling import SamplingSettings
from diffva_ray.counterfactual.attribution import attribution, energy
from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.data.phantoms import phantom
from diffva_ray.model.bundle import Bundle, build

IMAGES = [phantom(label, n, seed=1, size=32).image for n, label in enumerate(["COVID", "Lung_Opacity", "Normal"])]

SETTINGS = SamplingSettings(
    method="sdedit",
    scheduler="ddim",
    strength=0.7,
    guidance_scale=3.0,
    num_inference_steps=6,
)
UNEDITED = SETTINGS.replace(strength=0.5, guidance_scale=1.0)
HEALTHY, ILL = "normal chest scan", "COVID 19"


@pytest.fixture
def engine(complete: Callable[[], Bundle]) -> CounterfactualEngine:
    return CounterfactualEngine(complete(), device="cpu")


@pytest.mark.parametrize(
    ("steps", "strength", "guidance"), [(20, 0.55, 4.0), (10, 0.85, 7.5), (8, 1.0, 2.0), (20, 0.4, 0.01), (5, 0.2, 4.0)]
)
def test_pndm_diffusers_is_the_img2img_pipeline(tiny: Recipe, steps: int, strength: float, guidance: float) -> None:
    """The same pixels as StableDiffusionImg2ImgPipeline with a generator per image, guidance <= 1 included.

    On an untrained network and the pipeline's batch size: results of other batch sizes differ in float32's last digit,
    and a network after four training steps amplifies that to a grey level.
    """
    bundle = build(tiny)
    changes = {"posterior": "sample", "micro_batch": 3, "source_prompt": "", "negative_prompt": ""}
    engine = CounterfactualEngine(bundle, bundle.recipe.generate.model_copy(update=changes), "cpu")
    settings = SETTINGS.replace(
        scheduler="pndm-diffusers", strength=strength, guidance_scale=guidance, num_inference_steps=steps
    )
    images = [np.round(image * 255).astype(np.float32) / 255 for image in IMAGES]
    ours = engine(images, [1, 2, 3], settings=settings).counterfactuals

    pipeline = StableDiffusionImg2ImgPipeline(
        vae=bundle.vae,
        text_encoder=bundle.text_encoder,
        tokenizer=bundle.tokenizer,
        unet=bundle.unet,
        scheduler=PNDMScheduler.from_config(bundle.scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt=["normal chest scan"] * 3,
        image=[Image.fromarray(np.round(image * 255).astype(np.uint8)).convert("RGB") for image in images],
        strength=strength,
        guidance_scale=guidance,
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2, 3)],
        output_type="pt",
    ).images
    assert np.abs(ours - theirs.mean(dim=1).numpy()).max() < 1e-5


@pytest.mark.parametrize(
    ("method", "scheduler"),
    [*(("sdedit", name) for name in ("pndm", "ddim", "dpmsolver++", "unipc", "euler", "vp-sde", "ve-sde")),
     *((name, "ddim") for name in ("ddim-inversion", "cycle", "masked", "classifier-guided", "controlnet")),
     *((name, "pndm") for name in ("text-to-image", "va-gan", "vant-gan", "ant-gan")),
     *((name, "ddim") for name in ("anoddpm", "autoddpm", "what-is-healthy")),
     *((name, "ddim") for name in ("wolleb", "diff-scm", "swiss-army-knife")),
     *((name, "ddim") for name in ("time", "textual-inversion", "singla", "steex")),
     ("charachon", "pndm")],
)  # fmt: skip
def test_neighbours_slots_and_padding_change_nothing(engine: CounterfactualEngine, method: str, scheduler: str) -> None:
    settings = SETTINGS.replace(method=method, scheduler=scheduler)
    together = engine(IMAGES, [5, 6, 7], [HEALTHY, ILL, HEALTHY], settings).counterfactuals
    alone = engine([IMAGES[0]], [5], [HEALTHY], settings).counterfactuals[0]
    moved = engine([IMAGES[2], IMAGES[1], IMAGES[0]], [9, 6, 5], [ILL, ILL, HEALTHY], settings).counterfactuals[2]
    assert np.array_equal(together[0], alone)
    assert np.array_equal(together[0], moved)


def test_a_compiled_engine_gives_the_same_images(engine: CounterfactualEngine) -> None:
    """With Dynamo forced to run eagerly; a slow test covers the rounding of compiled code."""
    plain = engine(IMAGES, [5, 6, 7], settings=SETTINGS).counterfactuals
    bundle = copy.deepcopy(engine.bundle)
    compiled = CounterfactualEngine(bundle, engine.config, "cpu")
    compiled.compile()
    assert bundle.unet._compiled_call_impl is not None
    with torch.compiler.set_stance("force_eager"):
        assert np.array_equal(compiled(IMAGES, [5, 6, 7], settings=SETTINGS).counterfactuals, plain)


def test_noise_depends_on_the_images_own_seed(engine: CounterfactualEngine) -> None:
    one, two, again = engine([IMAGES[0]] * 3, [1, 2, 1], settings=SETTINGS).counterfactuals
    assert np.array_equal(one, again)
    assert not np.array_equal(one, two)


def test_inversion_without_guidance_returns_to_the_autoencoders_image(engine: CounterfactualEngine) -> None:
    """Encoding and decoding under one prompt cancel, the better the more steps."""
    gaps = []
    for steps in (10, 100):
        settings = UNEDITED.replace(method="ddim-inversion", num_inference_steps=steps)
        counterfactuals = engine(IMAGES, [0, 0, 0], [""] * 3, settings)
        gaps.append(np.abs(counterfactuals.counterfactuals - counterfactuals.reconstructions).mean())
    assert gaps[1] < gaps[0]
    assert gaps[1] < 0.02


def test_cycle_without_guidance_returns_to_the_autoencoders_image_exactly(engine: CounterfactualEngine) -> None:
    settings = UNEDITED.replace(method="cycle")
    generate = CounterfactualEngine(engine.bundle, engine.config.model_copy(update={"source_prompt": ""}))
    counterfactuals = generate(IMAGES, [1, 2, 3], [""] * 3, settings)
    assert counterfactuals.counterfactuals == pytest.approx(counterfactuals.reconstructions, abs=1e-4)


@pytest.mark.parametrize("scheduler", ["dpmsolver++", "unipc", "euler"])
def test_solvers_converge_to_the_same_counterfactual(engine: CounterfactualEngine, scheduler: str) -> None:
    """All solve the same differential equation, so with many steps they agree with DDIM."""
    settings = SETTINGS.replace(strength=0.5, guidance_scale=2.0)
    few, many = (
        np.abs(
            engine([IMAGES[0]], [3], [ILL], settings.replace(scheduler=name, num_inference_steps=steps)).counterfactuals
            - engine([IMAGES[0]], [3], [ILL], settings.replace(num_inference_steps=200)).counterfactuals
        ).mean()
        for name, steps in ((scheduler, 6), (scheduler, 100))
    )
    assert many < 0.01
    assert many <= few + 1e-3


def test_text_to_image_keeps_nothing_of_the_image(engine: CounterfactualEngine) -> None:
    """SDEdit at full strength still does: the schedule's last noise level keeps a part of the signal."""
    for method, same in (("text-to-image", True), ("sdedit", False)):
        settings = SETTINGS.replace(method=method, scheduler="pndm", strength=1.0, guidance_scale=1.0)
        first, second = (engine([image], [5], [HEALTHY], settings).counterfactuals for image in IMAGES[:2])
        assert np.array_equal(first, second) is same


def test_the_prompt_matters(engine: CounterfactualEngine) -> None:
    settings = SETTINGS.replace(guidance_scale=5.0)
    one, two = engine([IMAGES[0]] * 2, [1, 1], [HEALTHY, ILL], settings).counterfactuals
    assert not np.array_equal(one, two)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"method": "magic"}, "magic"),
        ({"strength": 0.01}, "no step"),
        ({"method": "ddim-inversion"}, "ddim"),
        ({"method": "cycle"}, "ddim"),
        ({"method": "masked"}, "ddim"),
        ({"method": "classifier-guided"}, "ddim"),
    ],
)
def test_unusable_settings_are_named(engine: CounterfactualEngine, change: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        engine([IMAGES[0]], [0], settings=SETTINGS.replace(**{"scheduler": "pndm", **change}))
    with pytest.raises(ValueError, match="1 to 4 images"):
        engine(IMAGES * 2, [0] * 6)


def test_maps_are_signed_differences(engine: CounterfactualEngine) -> None:
    image, reconstruction, counterfactual = (np.full((16, 16), value, np.float32) for value in (0.7, 0.6, 0.2))
    config = engine.config.model_copy(update={"smoothing": 0.0})
    raw = attribution(image, reconstruction, counterfactual, config.model_copy(update={"difference": "raw"}))
    compensated = attribution(
        image, reconstruction, counterfactual, config.model_copy(update={"difference": "compensated"})
    )
    assert raw == pytest.approx(np.full((16, 16), 0.5))
    assert compensated == pytest.approx(np.full((16, 16), 0.4))
    lungs = np.zeros((16, 16), bool)
    lungs[:8] = True
    assert energy(-raw, lungs) == (pytest.approx(0.5), pytest.approx(0.5))
    assert energy(0 * raw, lungs)[1] is None


def test_images_that_float16_cannot_represent_are_generated_in_float32(complete: Callable[[], Bundle]) -> None:
    """Above 65504 float16 is infinite. Each such image gets the pixels of float32, alone or in company, and the others
    keep theirs."""
    bundle = complete()
    config = bundle.recipe.generate.model_copy(update={"dtype": "float16"})
    engine = CounterfactualEngine(bundle, config, "cpu")
    usual = engine(IMAGES, [1, 2, 3])
    assert usual.in_float32 == [False] * 3

    decode = engine.model.decode

    def overflows(latents: torch.Tensor) -> torch.Tensor:
        images = decode(latents)
        if bundle.vae.dtype == torch.float16:
            images[1] = torch.inf
        return images

    engine.model.decode = overflows
    batch = engine(IMAGES, [1, 2, 3])
    alone = engine([IMAGES[0], IMAGES[1]], [1, 2])
    assert batch.in_float32 == [False, True, False]
    assert np.isfinite(batch.counterfactuals).all()
    assert np.array_equal(batch.counterfactuals[[0, 2]], usual.counterfactuals[[0, 2]])
    assert np.array_equal(batch.counterfactuals[1], alone.counterfactuals[1])
    assert 0 < np.abs(batch.counterfactuals[1] - usual.counterfactuals[1]).max() < 0.05
    engine.model.decode = decode
    assert np.array_equal(engine(IMAGES, [1, 2, 3]).counterfactuals, usual.counterfactuals)  # float16 again, unchanged


def test_upsamplers_and_text_encoder_are_not_rounded_twice(complete: Callable[[], Bundle]) -> None:
    exact, half = (
        CounterfactualEngine(bundle, bundle.recipe.generate.model_copy(update={"dtype": dtype}), "cpu")
        for dtype in ("float32", "bfloat16")
        for bundle in [complete()]
    )
    assert torch.equal(half.embed(HEALTHY), exact.embed(HEALTHY))
    kernels, rounded = (
        {name: kernel for name, kernel in engine.bundle.unet.named_buffers() if "kernel_" in name}
        for engine in (exact, half)
    )
    assert kernels
    for name, kernel in kernels.items():
        assert torch.equal(rounded[name], kernel.bfloat16())


def test_switches_that_change_a_gpus_pixels_are_set(
    complete: Callable[[], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    for switch in ("benchmark", "deterministic", "allow_tf32"):
        monkeypatch.setattr(torch.backends.cudnn, switch, switch != "deterministic")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    engine = CounterfactualEngine(complete(), device="cpu")
    assert not torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Z9")
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91300)
    engine.device = torch.device("cuda")
    assert engine.device_name == "NVIDIA Z9, CUDA 13.2, cuDNN 91300"  # other libraries round differently, too
