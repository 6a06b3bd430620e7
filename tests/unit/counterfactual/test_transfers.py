"""No sampler step makes the CPU wait for the GPU: nothing is copied between the two in the denoising loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transfers import GPU, Transfers

from diffva_ray.config.generation import AccelerationConfig
from diffva_ray.config.methods import METHODS
from diffva_ray.config.sampling import SamplingSettings
from diffva_ray.counterfactual.guess import NOISE_SAMPLES, TIMESTEPS, guess
from diffva_ray.counterfactual.latent_diffusion import Edit, LatentDiffusion
from diffva_ray.counterfactual.methods import GENERATE
from diffva_ray.model.bundle import Bundle
from diffva_ray.model.image_conditioning import add_image_channels
from diffva_ray.model.schedulers import SCHEDULERS


def test_every_kind_of_transfer_is_counted() -> None:
    here, there = torch.arange(3), torch.empty(3, device=GPU)
    for transfer in (
        lambda: here.to(GPU),
        lambda: there.cpu(),
        lambda: there[0].item(),
        lambda: there[here],
        lambda: there.tolist(),
        lambda: there.copy_(here),
        lambda: torch.tensor([0.5], device=GPU),
        lambda: torch.as_tensor(0.5, device=GPU),
        lambda: bool(there[0] > 0),
        lambda: there[torch.zeros((), device=GPU, dtype=torch.long)],
    ):
        with Transfers() as transfers:
            transfer()
        assert transfers.counts.total() == 1
    with Transfers() as transfers:
        here.to(GPU, non_blocking=True)
    assert transfers.counts == {"to the GPU, without a wait": 1}
    with Transfers() as transfers:
        _ = there * here[1] + there[here[1]] ** here[2]  # a scalar on the CPU is an argument of a kernel
    assert transfers.counts.total() == 0


@pytest.fixture
def on_gpu(complete: Callable[[], Bundle]) -> Callable[..., LatentDiffusion]:
    def make(method: str = "sdedit", device: torch.device = GPU) -> LatentDiffusion:
        bundle = complete()
        if method == "instruct-pix2pix":
            add_image_channels(bundle.unet)
        for module in [*bundle.modules.values(), *bundle.extras.values()]:
            module.to(device).eval().requires_grad_(False)
        return LatentDiffusion(bundle)

    return make


def edit(model: LatentDiffusion, method: str, scheduler: str, steps: int, **acceleration: Any) -> Edit:
    device = next(model.unet.parameters()).device
    size, width = model.bundle.recipe.model.resolution, model.unet.config.cross_attention_dim
    config = model.bundle.recipe.generate.model_copy(update={"acceleration": AccelerationConfig(**acceleration)})
    embedding = torch.empty(2, 16, width, device=device)
    return Edit(
        images=torch.empty(2, size, size, device=device),
        lungs=torch.ones(2, size, size, device=device, dtype=torch.bool),
        latents=torch.empty(2, 4, size // 4, size // 4, device=device),
        generators=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        prompt=embedding,
        negative=embedding,
        empty=embedding,
        source=embedding,
        settings=SamplingSettings(
            method=method, scheduler=scheduler, strength=0.75, guidance_scale=3.0, num_inference_steps=steps
        ),
        config=config,
    )


def transfers_of(model: LatentDiffusion, request: Edit) -> Counter[str]:
    with Transfers() as transfers, torch.inference_mode():
        GENERATE[request.settings.method](model, request)
    return transfers.counts


PAIRS = [
    (method, scheduler)
    for method, facts in METHODS.items()
    if facts.reads_prompt or facts.scheduler
    for scheduler in ([facts.scheduler] if facts.scheduler else SCHEDULERS)
]


@pytest.mark.parametrize(("method", "scheduler"), PAIRS)
def test_more_steps_transfer_nothing_more(method: str, scheduler: str, on_gpu: Callable[..., LatentDiffusion]) -> None:
    """With 4 and with 16 steps; what remains is the noise, the timesteps and a ControlNet's conditions, once each."""
    few, many = (transfers_of(on_gpu(method), edit(on_gpu(method), method, scheduler, n)) for n in (4, 16))
    assert few == many
    assert many.total() <= 6


def test_shortcuts_and_velocity_transfer_nothing_more(on_gpu: Callable[..., LatentDiffusion]) -> None:
    for scheduler in SCHEDULERS:
        few, many = (
            transfers_of(model, edit(model, "sdedit", scheduler, n, deep_features_every=2, guidance_end=0.5))
            for n in (4, 16)
            for model in [on_gpu()]
            if not model.bundle.scheduler.update(prediction_type="v_prediction")
        )
        assert few == many, scheduler


def test_the_guess_reads_its_answer_only(on_gpu: Callable[..., LatentDiffusion]) -> None:
    model = on_gpu()
    latents = torch.empty(2, 4, 8, 8, device=GPU)
    width = model.unet.config.cross_attention_dim
    embedding = torch.empty(1, 16, width, device=GPU)
    for uploads in (len(TIMESTEPS), 0):  # the first call copies the timesteps
        with Transfers() as transfers:
            guess(model, latents, [embedding] * 3, [1, 2])
        noises = NOISE_SAMPLES * len(TIMESTEPS)
        assert transfers.counts == {"to the GPU": noises + uploads, "to the CPU": 1}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("method", "scheduler"), PAIRS)
def test_a_gpu_is_not_waited_for(method: str, scheduler: str, on_gpu: Callable[..., LatentDiffusion]) -> None:
    """PyTorch itself raises an error where a step of the loop makes the CPU wait."""
    model = on_gpu(method, torch.device("cuda"))
    request = edit(model, method, scheduler, 8)
    GENERATE[method](model, request)  # kernels, and what is copied once
    step = model.predict

    def watched(*arguments: Any, **options: Any) -> torch.Tensor:
        output = step(*arguments, **options)
        torch.cuda.set_sync_debug_mode("error")  # from the first call of the network to the decoder
        return output

    decode, model.predict = model.decode, watched

    def ended(latents: torch.Tensor) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("default")
        return decode(latents)

    model.decode = ended
    try:
        GENERATE[method](model, request)
    finally:
        torch.cuda.set_sync_debug_mode("default")
