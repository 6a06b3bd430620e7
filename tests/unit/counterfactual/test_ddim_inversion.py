"""The inversion against diffusers' DDIMInverseScheduler, for both kinds of networks."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler

from diffva_ray.config.recipe import Recipe
from diffva_ray.counterfactual.ddim_inversion import inversion_path
from diffva_ray.counterfactual.latent_diffusion import Edit, LatentDiffusion
from diffva_ray.model.bundle import build


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@torch.inference_mode()
def test_the_path_is_that_of_diffusers_inverse_scheduler(tiny: Recipe, prediction: str) -> None:
    bundle = build(tiny)
    bundle.scheduler = {**bundle.scheduler, "prediction_type": prediction}
    model = LatentDiffusion(bundle)
    latents = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    text = torch.randn((2, 16, bundle.unet.config.cross_attention_dim), generator=torch.Generator().manual_seed(1))
    settings = bundle.recipe.generate.sampling.replace(
        method="ddim-inversion", scheduler="ddim", strength=0.6, num_inference_steps=10
    )
    nothing: dict[str, Any] = {
        "images": None,
        "lungs": None,
        "generators": (),
        "prompt": text,
        "negative": text,
        "empty": text,
    }
    request = Edit(
        latents=latents,
        source=text,
        settings=settings,
        config=bundle.recipe.generate,
        **cast("dict[str, Any]", nothing),
    )
    _, timesteps = model.schedule(request)
    path = inversion_path(model, request, timesteps)

    theirs = DDIMInverseScheduler.from_config(DDIMScheduler.from_config(bundle.scheduler).config, clip_sample=False)
    theirs.set_timesteps(10)
    assert torch.equal(theirs.timesteps[: len(timesteps)], timesteps.flip(0))
    expected = [latents]
    for t in theirs.timesteps[: len(timesteps)]:
        expected.insert(0, theirs.step(model.predict(expected[0], t, text), t, expected[0]).prev_sample)
    assert len(path) == len(timesteps) + 1
    for ours, step in zip(path, expected, strict=True):
        torch.testing.assert_close(ours, step, atol=1e-5, rtol=1e-5)
