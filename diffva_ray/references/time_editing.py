"""TIME (Orgad et al. 2023, "Editing implicit assumptions in text-to-image diffusion models", equation 4; method
``time``): edit the keys and values of all cross-attentions in closed form, so that the words of a disease mean what the
healthy prompt means, then invert the image under its source prompt and decode it under the same prompt with the edited
model. For a projection W, source tokens k and the destination tokens d at their places,

    W' = (lambda W + sum W d k^T) (lambda 1 + sum k k^T)^-1,    lambda: ``generate.references.editing_weight`` (0.1),

which minimises sum |W' k - W d|^2 + lambda |W' - W|^2. Tokens that no source prompt has are mapped as before.

Differences: the authors generate images from noise, while we edit an image by DDIM inversion. Their destination prompt
holds the source prompt's words and one more, and tokens are aligned by word; ours are aligned by position. All diseases
of the model are edited at once, so that a result does not depend on the batch. An image that the model takes for
healthy has an empty source prompt and is only reconstructed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from diffva_ray.counterfactual.ddim_inversion import invert
from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion
from diffva_ray.model import text

EDITED = (".attn2.to_k", ".attn2.to_v")  # diffusers' names of the projections that read the prompt


def generate(model: LatentDiffusion, request: Edit) -> Generated:
    """Edit a batch; the healthy prompt is the recipe's, and the prompt of the run has no effect."""
    scheduler, timesteps = model.schedule(request)
    z_t = invert(model, request, timesteps)
    with means_healthy(model, request.config.references.editing_weight):
        same = replace(request, prompt=request.source, negative=request.empty, further=())
        return model.generated(model.denoise(z_t, same, scheduler, timesteps), request)


@contextmanager
def means_healthy(model: LatentDiffusion, weight: float) -> Iterator[None]:
    """Edit the projections of the model's cross-attentions while the block runs."""
    data = model.bundle.recipe.data
    diseases = [prompt for label, prompt in data.prompts.items() if label != data.healthy_class]
    target, *of_diseases = tokens(model, [data.healthy_prompt, *diseases])
    sources = torch.cat(of_diseases)
    layers = [layer for name, layer in model.unet.named_modules() if f".{name}".endswith(EDITED)]
    before = [layer.weight.clone() for layer in layers]
    try:
        for layer in layers:
            layer.weight.copy_(edited(layer.weight, sources, target.repeat(len(diseases), 1), weight))
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.weight.copy_(own)


def edited(matrix: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor, weight: float) -> torch.Tensor:
    """W' [out, width] of a projection W, for source and target tokens [m, width]."""
    w, k, d = (tensor.double() for tensor in (matrix, sources, targets))
    wanted = weight * w + (d @ w.T).T @ k
    gram = weight * torch.eye(k.shape[1], dtype=k.dtype, device=k.device) + k.T @ k
    solved: torch.Tensor = torch.linalg.solve(gram, wanted.T).T.to(matrix.dtype)  # the Gram matrix is symmetric
    return solved


def tokens(model: LatentDiffusion, prompts: Sequence[str]) -> torch.Tensor:
    """The tokens of prompts [n, length, width] as the cross-attentions read them."""
    ids, mask = text.tokenize(model.bundle.tokenizer, prompts)
    device = next(model.unet.parameters()).device
    states = text.embed(model.bundle.text_encoder, ids.to(device), mask.to(device))
    projection: Any = model.unet.encoder_hid_proj
    projected: torch.Tensor = states if projection is None else projection(states.to(projection.weight.dtype))
    return projected
