"""What ``vant-gan`` and ``ant-gan`` have in common: the twin comes out of a trained generator in one pass."""

from __future__ import annotations

from diffva_ray.counterfactual.latent_diffusion import Edit, Healed, LatentDiffusion


def one_pass(model: LatentDiffusion, request: Edit, name: str) -> Healed:
    """The films as the model's extra network ``name`` draws them; prompt, noise and steps play no part. Raises
    UnusableModel for a model without that network."""
    dtype = next(model.unet.parameters()).dtype
    healer = model.bundle.extra(name).to(request.films.device, dtype).eval().requires_grad_(False)
    return Healed(healer.heal(request.films), request.films)
