"""Accelerations of the sampler: deep features that are kept between steps, and the interval of guidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from diffva_ray.config.generation import AccelerationConfig
from diffva_ray.counterfactual.deep_features import deep_features_kept
from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.data.phantoms import phantom
from diffva_ray.model.bundle import Bundle

IMAGES = [phantom(label, n, seed=1, size=32).image for n, label in enumerate(["COVID", "Lung_Opacity", "Normal"])]


@pytest.fixture(scope="module")
def bundle(complete: Callable[[], Bundle]) -> Bundle:
    return complete()


def call(unet: Any, latents: torch.Tensor, timestep: int = 100) -> torch.Tensor:
    states = torch.ones(len(latents), 4, unet.config.cross_attention_dim)
    with torch.inference_mode():
        return unet(latents, torch.tensor(timestep), encoder_hidden_states=states).sample


def test_kept_features_equal_recomputed_ones(bundle: Bundle) -> None:
    """Equal inputs have equal deep features, so a short call equals the whole one. A call is whole after ``every``
    calls and for another number of images, and afterwards the UNet is unchanged."""
    unet = bundle.unet
    one, other = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected, later = call(unet, one), call(unet, other, 80)
    with deep_features_kept(unet, 2):
        assert torch.equal(call(unet, one), expected)
        assert torch.equal(call(unet, one), expected), "short"
        assert torch.equal(call(unet, other, 80), later), "whole again"
        short = call(unet, one)
        assert not torch.equal(short, later), "the outermost layers see their own input"
        assert not torch.equal(short, expected), "its deep features are from the last whole call"
        assert torch.equal(call(unet, one[:2]), call(unet, one[:2]))
        assert torch.allclose(call(unet, one[:2]), expected[:2], atol=1e-5), "fewer images: whole"
    assert torch.equal(call(unet, one), expected)
    assert not any("forward" in vars(module) for module in unet.modules())


def test_short_calls_skip_the_deep_layers(bundle: Bundle) -> None:
    counts = {"middle": 0, "first": 0, "last": 0}
    unet = bundle.unet
    for name, layer in {"middle": unet.mid_block.resnets[0], "first": unet.conv_in,
                        "last": unet.up_blocks[-1].resnets[-1]}.items():  # fmt: skip
        layer.register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
    with deep_features_kept(unet, 3):
        for timestep in range(100, 30, -10):
            call(unet, torch.zeros(1, 4, 8, 8), timestep)
    assert counts == {"middle": 3, "first": 7, "last": 7}


def test_the_unet_is_restored_after_a_failure(bundle: Bundle) -> None:
    with pytest.raises(RuntimeError), deep_features_kept(bundle.unet, 2):
        call(bundle.unet, torch.zeros(1, 5, 8, 8))
    assert not any("forward" in vars(module) for module in bundle.unet.modules())


@pytest.mark.parametrize("method", ["sdedit", "ddim-inversion", "masked"])
def test_shortcuts_from_end_to_end(bundle: Bundle, method: str) -> None:
    def counterfactuals(scale: float = 3.0, **shortcuts: Any) -> NDArray[np.float32]:
        config = bundle.recipe.generate.model_copy(update={"acceleration": AccelerationConfig(**shortcuts),
                                                           "source_prompt": "COVID 19"})  # fmt: skip
        generate = CounterfactualEngine(bundle, config, "cpu")
        settings = {"method": method, "scheduler": "ddim", "strength": 0.8, "num_inference_steps": 8}
        settings |= {"guidance_scale": scale}
        return generate(IMAGES, [1, 2, 3], settings=generate.settings.replace(**settings)).counterfactuals

    plain, unguided = counterfactuals(), counterfactuals(1.0)
    assert np.array_equal(counterfactuals(guidance_start=0.0, guidance_end=1.0, deep_features_every=1), plain)
    assert np.array_equal(counterfactuals(guidance_end=0.0), unguided), "an empty interval means no guidance"
    assert np.array_equal(counterfactuals(guidance_start=1.0), unguided)
    half = counterfactuals(guidance_start=0.5)
    assert not np.array_equal(half, plain)
    assert not np.array_equal(half, unguided)
    kept = counterfactuals(deep_features_every=2)
    assert not np.array_equal(kept, plain)
    assert np.array_equal(kept, counterfactuals(deep_features_every=2)), "no features are kept between images"
