"""Baselines from before diffusion, in which a trained generator makes the counterfactual in one pass; ``train/gan.py``
has their losses. ``vant-gan`` generates a map that is added to the image (Baumgartner et al. 2018, "Visual feature
attribution using Wasserstein GANs"), ``ant-gan`` the whole image (Sun et al. 2020, "An adversarial learning approach to
medical image synthesis for lesion detection")."""

from __future__ import annotations

from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion


def vant_gan(model: LatentDiffusion, request: Edit) -> Generated:
    """Apply the network ``vant_gan``; prompt, noise and steps have no effect. Raises UnusableModel without it."""
    return _one_pass(model, request, "vant_gan")


def ant_gan(model: LatentDiffusion, request: Edit) -> Generated:
    """Apply the network ``ant_gan``; prompt, noise and steps have no effect. Raises UnusableModel without it."""
    return _one_pass(model, request, "ant_gan")


def _one_pass(model: LatentDiffusion, request: Edit, network: str) -> Generated:
    dtype = next(model.unet.parameters()).dtype
    gan_generator = model.bundle.extra(network).to(request.images.device, dtype).eval().requires_grad_(False)
    return Generated(gan_generator.generate(request.images), request.images)
