"""``vant-gan``: a GAN generates a map that is added to the image, in one pass (Baumgartner et al. 2018, "Visual feature
attribution using Wasserstein GANs"). A baseline from before diffusion; train/gan.py has the losses."""

from __future__ import annotations

from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion
from diffva_ray.counterfactual.one_pass import one_pass


def generate(model: LatentDiffusion, request: Edit) -> Generated:
    """Edit a batch by the network ``vant_gan``; see ``one_pass``."""
    return one_pass(model, request, "vant_gan")
