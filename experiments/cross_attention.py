"""Cross-attention maps: how strongly each part of an image attends to the words of a prompt. An attribution without an
edit (Tang et al. 2023, "What the DAAM"; Vilouras et al. 2024, "Zero-shot medical phrase grounding using off-the-shelf
diffusion models")."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.counterfactual.latent_diffusion import LatentDiffusion
from diffva_ray.counterfactual.noising import noised
from diffva_ray.data.images import to_square
from diffva_ray.model import text

TIMESTEPS = (0.1, 0.2, 0.3, 0.4, 0.5)  # of the training schedule


class StoringProcessor:
    """A diffusers attention processor that stores each call's probabilities [n, pixels, tokens], averaged over heads,
    and calls the original processor for the output."""

    def __init__(self, inner: Any, probabilities: list[torch.Tensor]) -> None:
        self.inner, self.probabilities = inner, probabilities

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        mask = attn.prepare_attention_mask(attention_mask, key.shape[1], len(hidden_states))
        probabilities = attn.get_attention_scores(query, key, mask)
        self.probabilities.append(probabilities.float().unflatten(0, (len(hidden_states), attn.heads)).mean(dim=1))
        return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


@contextmanager
def stored(unet: Any) -> Iterator[list[torch.Tensor]]:
    """Collect the cross-attention probabilities of all calls of ``unet``; its processors are restored at the end."""
    originals, probabilities = dict(unet.attn_processors), list[torch.Tensor]()
    storing = {
        name: StoringProcessor(processor, probabilities) if ".attn2." in name else processor
        for name, processor in originals.items()
    }
    unet.set_attn_processor(storing)
    try:
        yield probabilities
    finally:
        unet.set_attn_processor(originals)


@torch.inference_mode()
def cross_attention(
    model: LatentDiffusion,
    latents: torch.Tensor,
    embeddings: torch.Tensor,
    words: torch.Tensor,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """Mean probability [n, h, w] with which each cell of ``latents`` [n, 4, h, w] attends to the ``words`` (bool [n,
    length]) of its prompt ``embeddings`` [n, length, width]. The mean is over layers (resized to the latents' grid),
    heads, timesteps and words.

    Costs len(TIMESTEPS) network calls. Raises ValueError for a network without cross-attention or an image without
    words.
    """
    if not words.any(dim=1).all():
        raise ValueError("cross-attention maps need words to attend to; got a prompt without words")
    total, calls = torch.zeros_like(latents[:, 0]), 0
    height, width = latents.shape[2:]
    for fraction in TIMESTEPS:
        # Noise to a level, and record what the network attends to.
        z_t, _, t, _ = noised(model, latents, fraction, generators)
        with stored(model.unet) as layers:
            model.predict(z_t, t, embeddings)

        # Average over the words, and resize each layer's grid to the latents'.
        for probabilities in layers:
            factor = math.isqrt(height * width // probabilities.shape[1])
            attention = (probabilities * words[:, None]).sum(dim=2) / words.sum(dim=1, keepdim=True)
            grid = attention.unflatten(1, (1, height // factor, width // factor))
            total += functional.interpolate(grid, size=(height, width), mode="bilinear")[:, 0]
        calls += len(layers)
    if not calls:
        raise ValueError("the model's UNet has no cross-attention to read maps from")
    return total / calls


def cross_attention_maps(
    engine: CounterfactualEngine,
    images: Sequence[NDArray[np.float32]],
    prompts: Sequence[str],
    seeds: Sequence[int],
) -> NDArray[np.float32]:
    """Maps [n, size, size] in [0, 1] of grey images [H, W] in [0, 1], each under its own prompt (for example the class
    prompt it was taken to show). A map depends on its own image, prompt and seed alone. Raises ValueError as
    ``cross_attention``."""
    maps, full = list[NDArray[np.float32]](), engine.config.micro_batch
    for start in range(0, len(images), full):
        # Pad the last batch with its last image.
        slots = [min(n, len(images) - 1) for n in range(start, start + full)]
        squares = torch.from_numpy(np.stack([to_square(images[n], engine.size) for n in slots])).to(engine.device)
        with torch.inference_mode():
            latents = engine.model.encode(squares)[0].float() * engine.model.scale
            grids = cross_attention(
                engine.model,
                latents,
                torch.cat([engine.embed(prompts[n]) for n in slots]),
                torch.cat([words(engine.bundle.tokenizer, prompts[n]) for n in slots]).to(engine.device),
                [torch.Generator("cpu").manual_seed(seeds[n]) for n in slots],
            )
            grids = functional.interpolate(grids[:, None], size=(engine.size,) * 2, mode="bilinear")[:, 0]
        maps += list(grids.cpu().numpy()[: len(images) - start])
    return np.stack(maps)


def words(tokenizer: Any, prompt: str) -> torch.Tensor:
    """Which tokens of a prompt are words, not padding or markers: bool [1, length]."""
    ids, _ = text.tokenize(tokenizer, [prompt])
    return ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
