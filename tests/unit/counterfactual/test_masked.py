"""``masked``: bit for bit the image outside the mask, no visible seam, and the mask in the right place."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffva_ray.config.generation import MaskedConfig
from diffva_ray.config.recipe import RecipeError, load_recipe
from diffva_ray.counterfactual import masked
from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.counterfactual.guidance_difference import guidance_difference
from diffva_ray.counterfactual.latent_diffusion import Generated, LatentDiffusion
from diffva_ray.counterfactual.masked import blend, change_weight, feather, soften
from diffva_ray.data.encoding import quantise
from diffva_ray.data.phantoms import phantom
from diffva_ray.data.place_words import place_mask
from diffva_ray.generate.measures import unit
from diffva_ray.model.bundle import SD_SCHEDULER, load

PHANTOMS = [phantom(label, n, seed=1, size=32) for n, label in enumerate(["COVID", "Lung_Opacity", "Normal"])]
IMAGES = [unit(quantise(each.image)) for each in PHANTOMS]
LUNGS = [each.lungs for each in PHANTOMS]
NARROW = {"feather": 0.07, "dilation": 0.0}


def engine_with(model: Path, **changes: object) -> CounterfactualEngine:
    bundle = load(str(model))
    config = bundle.recipe.generate.model_copy(update={"masked": MaskedConfig(**changes), "source_prompt": ""})
    return CounterfactualEngine(bundle, config, "cpu")


def generate(engine: CounterfactualEngine, prompt: str = "normal chest scan", **changes: object):
    settings = engine.settings.replace(**{"method": "masked", "scheduler": "ddim", **changes})
    return engine(IMAGES, [1, 2, 3], [prompt] * len(IMAGES), settings, LUNGS)


@pytest.mark.parametrize("source", ["lungs", "derived", "difference"])
def test_pixels_outside_the_mask_are_the_images_own(source: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly, as floats and as the 8-bit images that a run stores; inside the mask pixels change."""
    plain = generate(engine_with(model), method="ddim-inversion")
    change = feather(torch.from_numpy(plain.counterfactuals - plain.reconstructions), 0.07).abs().numpy()
    low, high = (float(np.quantile(change, part)) for part in (0.9, 0.99))
    weights = []
    monkeypatch.setattr(masked, "blend", lambda weight, *pair: weights.append(weight) or blend(weight, *pair))
    counterfactuals = generate(
        engine_with(model, source=source, quantile=0.9, keep_below=low, edit_above=high, **NARROW)
    )
    weight, image = weights[0].numpy()[: len(IMAGES)], np.stack(IMAGES)
    outside = weight == 0
    assert 0.1 < outside.mean() < 0.9
    for images in (counterfactuals.counterfactuals, counterfactuals.reconstructions):
        assert np.array_equal(images[outside], image[outside])
        assert np.array_equal(quantise(images)[outside], quantise(image)[outside])
    assert (np.abs(counterfactuals.counterfactuals - image)[weight > 0.5] > 1e-3).mean() > 0.9


def test_the_lung_mask_is_the_one_passed_to_the_engine(model: Path) -> None:
    counterfactuals = generate(engine_with(model, source="lungs", feather=0.0, dilation=0.0))
    for n, image in enumerate(IMAGES):
        assert (np.abs(counterfactuals.counterfactuals[n] - image) > 1e-3)[LUNGS[n]].mean() > 0.9
        assert np.array_equal(counterfactuals.counterfactuals[n][~LUNGS[n]], image[~LUNGS[n]])


def test_the_prompt_says_which_part_of_the_lungs(model: Path) -> None:
    """Only there the image changes, as it does in that part under the prompt without the place."""
    placed = generate(engine_with(model, source="place", feather=0.0, dilation=0.0), "COVID in the left upper zone")
    for n, image in enumerate(IMAGES):
        part = place_mask("left upper", LUNGS[n])
        changed = np.abs(placed.counterfactuals[n] - image) > 1e-3
        assert changed[part].mean() > 0.9
        assert np.array_equal(placed.counterfactuals[n][~part], image[~part])
    engine = engine_with(model, source="lungs", feather=0.0, dilation=0.0)
    parts = [place_mask("left upper", lungs) for lungs in LUNGS]
    settings = engine.settings.replace(method="masked", scheduler="ddim")
    plain = engine(IMAGES, [1, 2, 3], ["COVID"] * len(IMAGES), settings, parts)
    assert np.array_equal(plain.counterfactuals, placed.counterfactuals)


def test_latents_outside_the_mask_follow_the_images_own_path(model: Path) -> None:
    """The cells outside the mask end as the image's own latents, also under strong guidance."""
    engine, ends = engine_with(model, source="lungs", **NARROW), []
    decode = engine.model.decode
    engine.model.decode = lambda latents: ends.append(latents) or decode(latents)
    generate(engine, guidance_scale=7.0)
    edited, own = ends
    moved = (edited - own).abs().amax(dim=1) > 0
    reach = soften(torch.from_numpy(np.stack([*LUNGS, LUNGS[0]])).float(), engine.config.masked)
    cells = torch.nn.functional.adaptive_max_pool2d(reach[:, None], tuple(own.shape[2:]))[:, 0] > 0
    assert torch.equal(moved, cells)
    assert not cells.all()


def test_without_guidance_the_reconstruction_comes_back(model: Path) -> None:
    """With equal source and target prompts a fine inversion changes nothing: the map is near zero in the mask too."""
    gaps = [
        np.abs(counterfactuals.counterfactuals - counterfactuals.reconstructions).mean()
        for steps in (6, 60)
        for counterfactuals in [
            generate(
                engine_with(model, source="lungs"), prompt="", guidance_scale=1.0, strength=0.5,
                num_inference_steps=steps,
            )
        ]
    ]  # fmt: skip
    assert gaps[1] < gaps[0]
    assert gaps[1] < 0.02


def test_no_seam_shows() -> None:
    """Blends in a much darker counterfactual: across the seam the blend changes no faster than the steepest tenth of
    the image does, where a hard mask leaves an edge."""
    image = torch.from_numpy(np.stack([phantom("Normal", n, seed=3, size=64).image for n in range(4)]))
    mask = torch.zeros_like(image)
    mask[:, 20:44, 18:40] = 1
    steep = image.diff(dim=2).abs().flatten(1).quantile(0.9, dim=1)
    for width, seamless in ((0.0, False), (0.06, True)):
        weight = soften(mask, MaskedConfig(feather=width, dilation=0.0))
        change = blend(weight, image - 0.25, image) - image
        seam = change.diff(dim=2).abs().amax(dim=(1, 2))
        assert bool((seam <= steep).all()) == seamless, width
    assert ((weight > 0) & (weight < 1)).any()


@pytest.mark.parametrize(("dilation", "feather"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1), (0.05, 0.1)])
def test_softening_keeps_the_mask_whole_and_stays_near_it(dilation: float, feather: float) -> None:
    mask = torch.zeros(1, 60, 60)
    mask[0, 25:35, 25:35] = 1
    weight = soften(mask, MaskedConfig(dilation=dilation, feather=feather))
    assert weight[mask == 1].min() > 1 - 1e-5
    reach = round(60 * (dilation + 2 * feather)) + 1
    far = torch.nn.functional.max_pool2d(mask[None], 2 * reach + 1, stride=1, padding=reach)[0] == 0
    assert weight[far].max() == 0
    grown = round(60 * dilation)
    assert weight[0, 30, 25 - grown] > 1 - 1e-5


def test_small_changes_have_weight_0_and_large_ones_weight_1() -> None:
    config = MaskedConfig(keep_below=0.1, edit_above=0.3, feather=0.0)
    change = torch.tensor([0.0, 0.09, -0.2, 0.2, 0.5, -0.5]).reshape(1, 1, 6)
    weight = change_weight(Generated(torch.zeros_like(change), change), config)
    assert weight.flatten().tolist() == pytest.approx([0, 0, 0.5, 0.5, 1, 1], abs=1e-6)


def test_feathering_keeps_the_sum_of_a_spot_inside_the_image() -> None:
    spot = torch.zeros(1, 40, 40)
    spot[0, 20, 20] = 1
    soft = feather(spot, 0.2)
    assert soft.sum().item() == pytest.approx(1, abs=1e-5)
    assert soft[0, 20, 11] == 0  # 8 pixels is 0.2 of the width


class Opinionated(torch.nn.Module):
    """Predicts noise that depends on the prompt in one corner only."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, latents, timestep, encoder_hidden_states):
        corner = torch.zeros_like(latents)
        corner[:, :, :3, :3] = encoder_hidden_states.mean(dim=(1, 2))[:, None, None, None]
        return SimpleNamespace(sample=latents * 0.1 + corner)


def test_the_guidance_difference_is_where_the_network_reads_the_prompt() -> None:
    model = LatentDiffusion(SimpleNamespace(vae=SimpleNamespace(config=SimpleNamespace(scaling_factor=1.0)),
                                            unet=Opinionated(), scheduler=SD_SCHEDULER))  # fmt: skip
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    healthy, source = torch.full((2, 3, 5), 1.0), torch.full((2, 3, 5), 3.0)
    generators = [torch.Generator().manual_seed(n) for n in range(2)]
    difference = guidance_difference(model, latents, healthy, source, generators)
    expected = torch.zeros(2, 8, 8)
    expected[:, :3, :3] = 2.0
    assert torch.allclose(difference, expected, atol=1e-5)


def test_thresholds_in_the_wrong_order_are_named() -> None:
    with pytest.raises(RecipeError, match=r"generate.masked.*keep_below 0.5"):
        load_recipe("phantom", ["generate.masked.keep_below=0.5"])
