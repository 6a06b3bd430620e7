"""No sampler step makes the CPU wait for the GPU: nothing is copied between the two in the denoising loop.

PyTorch's ``meta`` device is the GPU here: it computes shapes alone, and every copy from or to it is seen and counted. A
copy of pageable memory makes the CPU wait until the GPU has done all earlier work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffva_ray.config.generation import AccelerationConfig
from diffva_ray.config.methods import METHODS
from diffva_ray.config.sampling import SamplingSettings
from diffva_ray.counterfactual.guess import NOISE_SAMPLES, TIMESTEPS, guess
from diffva_ray.counterfactual.latent_diffusion import Edit, LatentDiffusion
from diffva_ray.counterfactual.methods import GENERATE
from diffva_ray.model.bundle import Bundle
from diffva_ray.model.image_conditioning import add_image_channels
from diffva_ray.model.schedulers import SCHEDULERS

GPU = torch.device("meta")
aten = torch.ops.aten


class Transfers(TorchDispatchMode):
    """Counts copies between CPU and GPU, and values that the CPU reads."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()
        self.factories = _Factories(self.counts)

    def __enter__(self) -> Transfers:
        self.factories.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.factories.__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, leaves = function.overloadpacket, tree_leaves((args, kwargs))
        devices = [leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if name in (aten._to_copy, aten.to):  # the second is not split up in inference mode
            named = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
            target = [*devices, *named][-1]
            if devices[0] != target:
                self.counts["to the GPU" if target == GPU else "to the CPU"] += 1
            if devices[0] == GPU != target:
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        elif name is aten.copy_ and devices[0] != devices[1]:
            self.counts["to the GPU" if devices[0] == GPU else "to the CPU"] += 1
            return args[0]
        elif name in (aten._local_scalar_dense, aten.nonzero, aten.equal, aten.is_nonzero) and GPU in devices:
            self.counts["to the CPU"] += 1
            return 0
        elif name in (aten.index, aten.index_put_) and len({*devices}) > 1:
            self.counts["to the GPU"] += 1  # indices that lie on the CPU
        return function(*args, **kwargs)


class _Factories(TorchFunctionMode):
    """Counts tensors that are made of Python's numbers on the GPU, and lists made of a tensor; dispatch does not see
    them."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = function in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor)
        if made and torch.device(kwargs.get("device") or "cpu") == GPU:
            self.counts["to the GPU"] += 1
        if function is torch.Tensor.tolist and args[0].device == GPU:
            self.counts["to the CPU"] += 1
            return torch.zeros(args[0].shape, dtype=args[0].dtype).tolist()
        return function(*args, **kwargs)


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
    if facts.reads_prompt
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
