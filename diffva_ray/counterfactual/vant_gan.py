"""``vant-gan``: the image plus a map drawn in one pass (Baumgartner et al. 2018, "Visual feature attribution using
Wasserstein GANs"), a reference from before diffusion; train/gan.py has its losses."""

from __future__ import annotations

from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion
from diffva_ray.counterfactual.one_pass import one_pass


def generate(model: LatentDiffusion, request: Edit) -> Generated:
    """See ``one_pass``."""
    return one_pass(model, request, "vant_gan")
