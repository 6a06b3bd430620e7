"""``vant-gan``: the film plus a map drawn in one pass (Baumgartner et al. 2018, "Visual feature attribution using
Wasserstein GANs"), a reference from before diffusion; train/gan.py has its losses."""

from __future__ import annotations

from diffva_ray.counterfactual.latent_diffusion import Edit, Healed, LatentDiffusion


def heal(model: LatentDiffusion, request: Edit) -> Healed:
    """Prompt, noise and steps play no part. Raises UnusableModel for a model without the network."""
    dtype = next(model.unet.parameters()).dtype
    healer = model.bundle.extra("vant_gan").to(request.films.device, dtype).eval().requires_grad_(False)
    return Healed(healer.heal(request.films), request.films)
