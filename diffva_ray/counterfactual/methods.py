"""The counterfactual methods by name. ``config/methods.py`` has their schedulers, networks and costs, without torch."""

from __future__ import annotations

from collections.abc import Callable

from diffva_ray.counterfactual import (
    classifier_guided,
    controlnet,
    cycle,
    ddim_inversion,
    instruct_pix2pix,
    masked,
    one_pass,
    sdedit,
    text_to_image,
)
from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion

GENERATE: dict[str, Callable[[LatentDiffusion, Edit], Generated]] = {
    "sdedit": sdedit.generate,
    "ddim-inversion": ddim_inversion.generate,
    "cycle": cycle.generate,
    "masked": masked.generate,
    "instruct-pix2pix": instruct_pix2pix.generate,
    "classifier-guided": classifier_guided.generate,
    "controlnet": controlnet.generate,
    "text-to-image": text_to_image.generate,
    "vant-gan": one_pass.vant_gan,
    "ant-gan": one_pass.ant_gan,
}
