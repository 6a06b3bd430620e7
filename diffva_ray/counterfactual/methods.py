"""The counterfactual methods by name. ``config/methods.py`` has their schedulers, networks and costs, without torch."""

from __future__ import annotations

from collections.abc import Callable

from diffva_ray.config.references import reference
from diffva_ray.counterfactual import (
    classifier_guided,
    controlnet,
    cycle,
    ddim_inversion,
    instruct_pix2pix,
    masked,
    sdedit,
    text_to_image,
)
from diffva_ray.counterfactual.latent_diffusion import Edit, Generated, LatentDiffusion


def _reference(path: str) -> Callable[[LatentDiffusion, Edit], Generated]:
    """The function of a reference system, loaded at its first call."""

    def generate(model: LatentDiffusion, request: Edit) -> Generated:
        generated: Generated = reference(path)(model, request)
        return generated

    return generate


GENERATE: dict[str, Callable[[LatentDiffusion, Edit], Generated]] = {
    "sdedit": sdedit.generate,
    "ddim-inversion": ddim_inversion.generate,
    "cycle": cycle.generate,
    "masked": masked.generate,
    "instruct-pix2pix": instruct_pix2pix.generate,
    "classifier-guided": classifier_guided.generate,
    "controlnet": controlnet.generate,
    "text-to-image": text_to_image.generate,
    "va-gan": _reference("va_gan.generate"),
    "vant-gan": _reference("vant_gan.generate"),
    "ant-gan": _reference("ant_gan.generate"),
    "anoddpm": _reference("healthy_only.anoddpm"),
    "autoddpm": _reference("healthy_only.autoddpm"),
    "what-is-healthy": _reference("what_is_healthy.generate"),
    "wolleb": _reference("wolleb.generate"),
    "diff-scm": _reference("diff_scm.generate"),
    "swiss-army-knife": _reference("swiss_army_knife.generate"),
    "time": _reference("time_editing.generate"),
    "textual-inversion": _reference("textual_inversion.generate"),
    "singla": _reference("singla.generate"),
    "steex": _reference("steex.generate"),
    "charachon": _reference("charachon.generate"),
}
