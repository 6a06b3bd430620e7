"""``sdedit``, the paper's method: noise the image part of the way, then denoise it under the healthy prompt
(Meng et al. 2022; the same as diffusers' StableDiffusionImg2ImgPipeline)."""

from __future__ import annotations

from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion, add_noise, noise


def generate(model: LatentDiffusion, request: Edit) -> Generated:
    """Edit a batch by SDEdit; each image's noise comes from its own generator."""
    scheduler, timesteps = model.schedule(request)

    # Noise to the first timestep that the strength leaves: z_t = sqrt(alpha_bar) z_0 + sqrt(1 - alpha_bar) eps.
    eps = noise(request.latents.shape, request.generators).to(request.latents)
    z_t = add_noise(scheduler, request.latents, eps, timesteps[0])

    # Denoise under guidance to the healthy prompt.
    z_0 = model.denoise(z_t, request, scheduler, timesteps)
    return model.generated(z_0, request)
