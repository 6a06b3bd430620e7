"""``ant-gan``: a GAN generates the whole image in one pass (Sun et al. 2020, "An adversarial learning approach to
medical image synthesis for lesion detection"). A baseline from before diffusion; train/gan.py has the losses."""

from __future__ import annotations

from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion
from diffva_ray.counterfactual.one_pass import one_pass


def generate(model: LatentDiffusion, request: Edit) -> Generated:
    """Edit a batch by the network ``ant_gan``; see ``one_pass``."""
    return one_pass(model, request, "ant_gan")
