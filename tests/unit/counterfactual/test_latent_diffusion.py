"""The accelerations of the networks do not change their output."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from torch.utils.flop_counter import FlopCounterMode

from diffva_ray.counterfactual.latent_diffusion import (
    FourPhases,
    LatentDiffusion,
    SharedStart,
    speed_up_doubling,
)
from diffva_ray.model.bundle import Bundle


def flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("size", [(4, 4), (5, 7)])
@torch.no_grad()
def test_four_phases_are_the_doubled_convolution(size: tuple[int, int]) -> None:
    upsample = Upsample2D(6, use_conv=True, out_channels=5)
    images = torch.randn(3, 6, *size)
    fast = FourPhases(upsample.conv)
    assert torch.allclose(fast(images), upsample(images), atol=1e-5)
    assert flops(lambda: fast(images)) * 9 == flops(lambda: upsample(images)) * 4


@torch.no_grad()
def test_networks_with_four_phases_give_the_same(complete: Callable[[], Bundle]) -> None:
    bundle = complete()
    fast = copy.deepcopy(bundle)
    for name in ("unet", "vae"):
        speed_up_doubling(fast.modules[name])
        assert not any(isinstance(module, Upsample2D) for module in fast.modules[name].modules())
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 16, bundle.text_encoder.config.hidden_size)
    assert torch.allclose(fast.vae.decode(latents).sample, bundle.vae.decode(latents).sample, atol=1e-4)
    ours, theirs = (one.unet(latents, 500, encoder_hidden_states=text).sample for one in (fast, bundle))
    assert torch.allclose(ours, theirs, atol=1e-4)


@torch.no_grad()
def test_non_finite_channels_decode_to_nan(complete: Callable[[], Bundle]) -> None:
    """A clamp alone would make an infinite channel white, and the record would count as ok."""
    model, latents = LatentDiffusion(complete()), torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        colours = model.vae.decode(latents / model.scale).sample / 2 + 0.5
        assert torch.equal(model.decode(latents), colours.clamp(0, 1).mean(dim=1))  # bit for bit
    with torch.no_grad():
        for value in (math.inf, -math.inf, math.nan):
            model.vae.decoder.conv_out.bias[1] = value
            assert model.decode(latents).isnan().all()


def test_branches_that_share_their_start_give_the_same(complete: Callable[[], Bundle]) -> None:
    unet = complete().unet
    one, text = torch.randn(3, 4, 8, 8), torch.randn(6, 16, unet.config.cross_attention_dim)
    both = torch.cat([one, one])

    def predict() -> torch.Tensor:
        return unet(both, torch.tensor(500), encoder_hidden_states=text).sample

    plain, work = predict(), flops(predict)
    with SharedStart(unet):
        shared, less = predict(), flops(predict)
    assert torch.allclose(shared, plain, atol=1e-5)
    assert less < work
    assert torch.equal(predict(), plain)  # the hooks do nothing any more


@torch.no_grad()
def test_a_compiled_unet_shares_the_start_while_it_is_told_to() -> None:
    """The compiler must not keep what it saw first."""
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",),
        mid_block_type=None,
    ).eval()  # fmt: skip
    compiled, graphs = copy.deepcopy(unet), list[int]()
    start, inner = SharedStart(unet), SharedStart(compiled)

    def traced(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(len(inputs))
        return graph.forward

    compiled.compile(backend=traced, dynamic=False, fullgraph=True)
    one, text = torch.randn(2, 4, 8, 8), torch.randn(4, 3, 8)
    for shared in (False, True, False):
        with start if shared else nullcontext(), inner if shared else nullcontext():
            found, expected = (
                each(torch.cat([one, one]), torch.tensor(500), encoder_hidden_states=text).sample
                for each in (compiled, unet)
            )
        assert torch.equal(found, expected)
    assert len(graphs) == 2
