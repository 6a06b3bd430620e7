"""``ant-gan``: the generated image drawn in one pass (Sun et al. 2020, "An adversarial learning approach to medical
image synthesis for lesion detection"), a reference from before diffusion; train/gan.py has its losses."""

from __future__ import annotations

from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion
from diffva_ray.counterfactual.one_pass import one_pass


def generate(model: LatentDiffusion, request: Edit) -> Generated:
    """See ``one_pass``."""
    return one_pass(model, request, "ant_gan")
