"""Sanchez & Tsaftaris 2022, "Diffusion causal models for counterfactual estimation" (Diff-SCM, method ``diff-scm``),
algorithm 1: abduction encodes the image by DDIM without the cause, the intervention sets the cause (the class), and the
prediction decodes along the gradient of an anticausal classifier of noisy images, as in ``wolleb``, with the dynamic
normalisation of the authors' code.

Differences: latents; abduction starts at the strength instead of always at pure noise; the cause is the class of the
data, and the classifier is the one that ``wolleb`` uses.
"""

from __future__ import annotations

from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion
from diffva_ray.references.what_is_healthy import dynamic_normalisation
from diffva_ray.references.wolleb import along_the_classifier


def generate(model: LatentDiffusion, request: Edit) -> Generated:
    """Edit a batch; prompts have no effect. Raises UnusableModel without a classifier."""
    return along_the_classifier(model, request, dynamic_normalisation(request))
