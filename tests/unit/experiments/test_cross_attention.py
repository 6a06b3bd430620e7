"""Cross-attention maps: on a network with known attention, and on the tiny model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cross_attention import cross_attention, cross_attention_maps, words
from diffusers.models.attention_processor import Attention

from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.counterfactual.latent_diffusion import LatentDiffusion
from diffva_ray.data.phantoms import phantom
from diffva_ray.model.bundle import SD_SCHEDULER

IMAGES = [phantom(label, n, seed=1, size=32).image for n, label in enumerate(["COVID", "Lung_Opacity", "Normal"] * 2)]


class KnownAttention(torch.nn.Module):
    """A single diffusers cross-attention over the latents' cells.

    Cells of the upper left quarter have a query along the first axis, all others along the second; token 1's key is the
    first axis, token 0's the second.
    """

    def __init__(self, sharpness: float = 20.0) -> None:
        super().__init__()
        self.block = torch.nn.ModuleDict(
            {"attn2": Attention(query_dim=2, cross_attention_dim=2, heads=2, dim_head=1, bias=False)}
        )
        attention = self.block["attn2"]
        for layer in (attention.to_q, attention.to_k):  # a head per axis would see one axis alone: mix both
            torch.nn.init.eye_(layer.weight)
        attention.to_q.weight.data *= sharpness

    @property
    def attn_processors(self):
        return {"block.attn2.processor": self.block["attn2"].processor}

    def set_attn_processor(self, processors) -> None:
        self.block["attn2"].set_processor(processors["block.attn2.processor"])

    def forward(self, latents, timestep, encoder_hidden_states):
        n, _, height, width = latents.shape
        states = torch.zeros(n, height, width, 2)
        states[..., 1] = 1
        states[:, : height // 2, : width // 2] = torch.tensor([1.0, 0.0])
        out = self.block["attn2"](states.reshape(n, -1, 2), encoder_hidden_states=encoder_hidden_states)
        return SimpleNamespace(sample=latents + 0 * out.sum())


def oracle() -> LatentDiffusion:
    vae = SimpleNamespace(config=SimpleNamespace(scaling_factor=1.0))
    return LatentDiffusion(SimpleNamespace(vae=vae, unet=KnownAttention(), scheduler=SD_SCHEDULER))


def test_a_word_maps_to_the_cells_that_attend_to_it() -> None:
    model = oracle()
    before = model.unet.attn_processors
    embeddings = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]).repeat(2, 1, 1)
    chosen = torch.tensor([[False, True], [True, False]])
    generators = [torch.Generator().manual_seed(n) for n in range(2)]
    quarter, rest = cross_attention(model, torch.zeros(2, 4, 8, 8), embeddings, chosen, generators)
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[:4, :4] = True
    # Head 0 sees the first axis only, head 1 the second: each is certain where the query is along its axis, else even.
    assert quarter[inside].min() > 0.74
    assert quarter[~inside].max() < 0.26
    assert torch.allclose(quarter + rest, torch.ones(8, 8), atol=1e-6)
    assert model.unet.attn_processors == before


def test_a_prompt_without_words_is_refused() -> None:
    with pytest.raises(ValueError, match="without words"):
        cross_attention(oracle(), torch.zeros(1, 4, 8, 8), torch.zeros(1, 2, 2), torch.zeros(1, 2).bool(), [])


@pytest.fixture
def engine(model: Path) -> CounterfactualEngine:
    return CounterfactualEngine.from_pretrained(str(model), device="cpu")


def test_a_map_depends_on_its_image_only_and_the_model_is_unchanged(engine: CounterfactualEngine) -> None:
    """Six images exceed one micro-batch."""
    before, processors = engine(IMAGES[:1], [3], ["COVID 19"]), engine.bundle.unet.attn_processors
    prompts = ["COVID 19", "Lung Opacity", "COVID 19"] * 2
    together = cross_attention_maps(engine, IMAGES, prompts, [1, 2, 3, 4, 5, 6])
    alone = cross_attention_maps(engine, IMAGES[4:5], prompts[4:5], [5])
    assert together.shape == (6, 32, 32)
    assert 0 < together.min() <= together.max() < 1
    assert np.array_equal(together[4], alone[0])
    assert not np.array_equal(together[4], cross_attention_maps(engine, IMAGES[4:5], ["COVID 19"], [5])[0])
    assert engine.bundle.unet.attn_processors == processors
    assert np.array_equal(engine(IMAGES[:1], [3], ["COVID 19"]).counterfactuals, before.counterfactuals)


def test_processors_are_restored_after_a_failure(engine: CounterfactualEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    processors = engine.bundle.unet.attn_processors

    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine.bundle.unet, "forward", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        cross_attention_maps(engine, IMAGES[:1], ["COVID 19"], [1])
    assert engine.bundle.unet.attn_processors == processors


def test_words_are_the_tokens_of_the_prompt(engine: CounterfactualEngine) -> None:
    tokenizer = engine.bundle.tokenizer
    assert words(tokenizer, "normal chest scan").sum() == len(tokenizer.tokenize("normal chest scan"))
    assert not words(tokenizer, "").any()
