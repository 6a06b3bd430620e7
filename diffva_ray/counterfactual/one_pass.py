"""Shared by ``vant-gan`` and ``ant-gan``: a trained generator makes the counterfactual in one pass."""

from __future__ import annotations

from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion


def one_pass(model: LatentDiffusion, request: Edit, name: str) -> Generated:
    """Apply the model's extra network ``name`` to the images; prompt, noise and steps have no effect. Raises
    UnusableModel for a model without that network."""
    dtype = next(model.unet.parameters()).dtype
    gan_generator = model.bundle.extra(name).to(request.images.device, dtype).eval().requires_grad_(False)
    return Generated(gan_generator.generate(request.images), request.images)
