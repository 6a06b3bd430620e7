"""``ant-gan``: the healed film drawn in one pass (Sun et al. 2020, "An adversarial learning approach to medical image
synthesis for lesion detection"), a reference from before diffusion; train/gan.py has its losses."""

from __future__ import annotations

from diffva_ray.counterfactual.latent_diffusion import Edit, Healed, LatentDiffusion
from diffva_ray.counterfactual.one_pass import one_pass


def heal(model: LatentDiffusion, request: Edit) -> Healed:
    """See ``one_pass``."""
    return one_pass(model, request, "ant_gan")
