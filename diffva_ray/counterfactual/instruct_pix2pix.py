"""``instruct-pix2pix``: generate the counterfactual from noise, by a network that reads the image itself beside the
noisy latents (Brooks et al. 2023, "InstructPix2Pix"; Saharia et al. 2022, "Palette").

The same noise is denoised twice: under the prompt, and under the empty prompt, which the network was taught to answer
with the unchanged image (``train/pairs.py``). Their difference is what the prompt changes, free of what network and
autoencoder lose. It is added to the image, which keeps its own pixels everywhere else.
"""

from __future__ import annotations

import torch

from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion, add_noise, noise
from diffva_ray.model.card import UnusableModel
from diffva_ray.model.image_conditioning import reads_image


def generate(model: LatentDiffusion, request: Edit) -> Generated:
    """Edit a batch. Raises UnusableModel for a network that was not trained on pairs."""
    if not reads_image(model.unet):
        raise UnusableModel(
            "method instruct-pix2pix needs a model trained on pairs (key pairs of a denoiser stage); choose another "
            "method with --method"
        )
    # "leading" timesteps begin below the noise that the latents are: one step would begin at 1, four at 751.
    scheduler, timesteps = model.schedule(request, timestep_spacing="trailing")

    # Start from noise alone, or, with a strength below 1, from the noisy image.
    start = noise(request.latents.shape, request.generators).to(request.latents)
    if request.settings.strength < 1:
        start = add_noise(scheduler, request.latents, start, timesteps[0])

    # Denoise without a change and with the edit, as one batch of 2n.
    both = torch.cat([start, start])
    image = request.latents / model.scale
    for t in timesteps:
        output = _predict(model, both, t, image, request)
        both = scheduler.step(output, t, both).prev_sample
    unchanged, edited = model.decode(both).chunk(2)

    # Add what the prompt changed to the image.
    return Generated((request.images + (edited - unchanged)).clamp(0, 1), request.images)


def _predict(
    model: LatentDiffusion, both: torch.Tensor, t: torch.Tensor, image: torch.Tensor, request: Edit
) -> torch.Tensor:
    """The network's output [2n, c, h, w] for the unchanged and the edited latents, the latter under guidance."""
    unchanged, edited = both.chunk(2)
    scale = request.settings.guidance_scale
    branches = [(unchanged, request.empty), (edited, request.prompt)]
    if scale > 1:  # as in all methods, a scale of 1 or less switches guidance off
        branches.append((edited, request.negative))
    output = model.predict(
        torch.cat([latents for latents, _ in branches]),
        t,
        torch.cat([embedding for _, embedding in branches]),
        image=torch.cat([image] * len(branches)),
    )
    kept, prompt, *negative = output.chunk(len(branches))
    return torch.cat([kept, prompt if not negative else negative[0] + scale * (prompt - negative[0])])
