"""``sdedit``, the paper's method: noise the image part of the way, denoise it under the healthy prompt
(Meng et al. 2022; StableDiffusionImg2ImgPipeline)."""

from __future__ import annotations

from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion, noise


def generate(model: LatentDiffusion, request: Edit) -> Generated:
    """Noise comes from each image's own generator."""
    scheduler, timesteps = model.schedule(request)
    fresh = noise(request.latents.shape, request.generators).to(request.latents)
    noisy = scheduler.add_noise(request.latents, fresh, timesteps[:1].repeat(len(fresh)))
    return model.generated(model.denoise(noisy, request, scheduler, timesteps), request)
