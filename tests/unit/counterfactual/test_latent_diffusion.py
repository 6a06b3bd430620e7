"""The accelerations of the networks do not change their output."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from torch.utils.flop_counter import FlopCounterMode

from diffva_ray.counterfactual.latent_diffusion import (
    FourPhases,
    LatentDiffusion,
    branches_share_their_start,
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
    with branches_share_their_start(unet):
        shared, less = predict(), flops(predict)
    assert torch.allclose(shared, plain, atol=1e-5)
    assert less < work
    assert torch.equal(predict(), plain)  # the hooks are removed
