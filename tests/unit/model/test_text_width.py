"""Text embeddings of another width than the base's: the projection, and which weights read the prompt."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from diffva_ray.config.recipe import Recipe, load_recipe
from diffva_ray.model.bundle import build
from diffva_ray.model.card import UnusableModel
from diffva_ray.model.cross_attention import cross_attention_parameters, fit_text_width, text_width


@pytest.fixture
def unet(tiny: Recipe):
    torch.manual_seed(0)
    return UNet2DConditionModel(**tiny.model.unet)


@pytest.mark.parametrize("width", [16, 48, 64, 80, 256])
def test_the_projection_keeps_the_weights_and_the_size_of_the_text(unet, width: int) -> None:
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    states = torch.randn(4000, width, generator=torch.Generator().manual_seed(1))
    fit_text_width(unet, width, seed=0)
    assert text_width(unet) == width
    assert all(torch.equal(value, unet.state_dict()[name]) for name, value in before.items())
    added = unet.state_dict().keys() - before.keys()
    if width == 64:
        assert not added
        return
    assert added == {"encoder_hid_proj.weight", "encoder_hid_proj.bias"}
    with torch.no_grad():
        assert unet.encoder_hid_proj(states).square().mean() == pytest.approx(1.0, rel=0.05)
    weight = unet.encoder_hid_proj.weight.detach()
    gram = weight.T @ weight if width < 64 else weight @ weight.T
    assert torch.allclose(gram, torch.eye(len(gram)) * gram[0, 0], atol=1e-5)  # all directions are equal

    sample, step = torch.randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():  # diffusers computes the old UNet on projected text
        actual = unet(sample, step, encoder_hidden_states=states[None, :5]).sample
        projected = unet.encoder_hid_proj(states[None, :5])
        unet.encoder_hid_proj, unet.config["encoder_hid_dim_type"] = None, None
        assert torch.allclose(actual, unet(sample, step, encoder_hidden_states=projected).sample)


def test_the_projection_is_seeded_and_removed_when_it_is_not_needed(unet) -> None:
    weights = []
    for width, seed in ((48, 3), (80, 0), (48, 3), (64, 0), (48, 4)):
        fit_text_width(unet, width, seed)
        weights.append(unet.encoder_hid_proj.weight if unet.encoder_hid_proj is not None else None)
    assert torch.equal(weights[0], weights[2])
    assert weights[3] is None
    assert not torch.equal(weights[0], weights[4])
    fit_text_width(unet, 48, seed=9)  # fits already: a trained projection stays
    assert unet.encoder_hid_proj.weight is weights[4]


def test_a_model_from_scratch_may_have_two_widths(tiny: Recipe) -> None:
    recipe = load_recipe("phantom", ["model.unet.sample_size=8", "model.resolution=32", "model.text.hidden_size=32"])
    bundle = build(recipe)
    assert (text_width(bundle.unet), bundle.unet.config.cross_attention_dim) == (32, 64)
    assert build(tiny).unet.encoder_hid_proj is None


def test_other_kinds_of_base_are_refused(unet) -> None:
    unet.register_to_config(encoder_hid_dim=8, encoder_hid_dim_type="image_proj")
    with pytest.raises(UnusableModel, match="Stable Diffusion 1 or 2"):
        fit_text_width(unet, 64, 0)


@pytest.mark.parametrize(
    "sign", [{"addition_embed_type": "text_time"}, {"class_embed_type": "timestep"}, {"num_class_embeds": 2}]
)
def test_bases_with_further_embeddings_are_refused(unet, sign: dict) -> None:
    """SDXL's sign is the first."""
    unet.register_to_config(**sign)
    with pytest.raises(UnusableModel, match="Stable Diffusion 1 or 2"):
        text_width(unet)


def test_which_weights_read_the_prompt(unet) -> None:
    """Keys and values of every cross-attention and the projection, but none of self-attention."""
    fit_text_width(unet, 48, 0)
    weights = cross_attention_parameters(unet)
    assert {"encoder_hid_proj.weight", "encoder_hid_proj.bias"} < weights.keys()
    layers = {name for name, module in unet.named_modules() if name.endswith("attn2")}
    assert {name for name in weights if "attn2" in name} == {
        f"{layer}.{part}.weight" for layer in layers for part in ("to_k", "to_v")
    }
    assert len(weights) == 2 * len(layers) + 2
    # with a projection of zeros, exactly these weights have no gradient
    unet.encoder_hid_proj.requires_grad_(False).weight.zero_()
    unet(torch.randn(1, 4, 8, 8), 10, encoder_hidden_states=torch.randn(1, 5, 48)).sample.square().sum().backward()
    for name, parameter in weights.items():
        assert parameter.grad is None or not parameter.grad.any(), name
    assert unet.conv_in.weight.grad.any()
    assert any(parameter.grad.any() for name, parameter in unet.named_parameters() if ".attn1.to_v." in name)
