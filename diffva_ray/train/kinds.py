"""The kinds of training stages by the name that a recipe gives in ``trains``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffva_ray.config.recipe import RecipeError
from diffva_ray.config.references import reference
from diffva_ray.config.training import Stage as AnyStageConfig
from diffva_ray.train.autoencoder import AutoencoderStage
from diffva_ray.train.classifier import ClassifierStage
from diffva_ray.train.controlnet import ControlNetStage
from diffva_ray.train.denoiser import DenoiserStage
from diffva_ray.train.factors import FactorsStage
from diffva_ray.train.judge import JudgeStage
from diffva_ray.train.stage import Stage, StageContext


def _reference(path: str) -> Callable[[StageContext, Any], Stage]:
    def make(context: StageContext, config: Any) -> Stage:
        stage: Stage = reference(path)(context, config)
        return stage

    return make


KINDS: dict[str, Callable[[StageContext, Any], Stage]] = {
    "autoencoder": AutoencoderStage,
    "denoiser": DenoiserStage,
    "controlnet": ControlNetStage,
    "judge": JudgeStage,
    "factors": FactorsStage,
    "classifier": ClassifierStage,
    "va-gan": _reference("va_gan.VaGanStage"),
    "vant-gan": _reference("vant_gan.VantGanStage"),
    "ant-gan": _reference("ant_gan.AntGanStage"),
    "textual-inversion": _reference("textual_inversion.TextualInversionStage"),
    "image-classifier": _reference("image_classifier.ImageClassifierStage"),
    "charachon": _reference("charachon.CharachonStage"),
    "singla": _reference("singla.SinglaStage"),
    "healthy-unet": _reference("healthy_only.HealthyDenoiserStage"),
}


def make_stage(context: StageContext, config: AnyStageConfig) -> Stage:
    """Build the stage that ``config`` describes. Raises RecipeError, UnusableData."""
    if config.trains not in KINDS:
        raise RecipeError(f"train.stages: unknown kind {config.trains!r}; use one of {', '.join(KINDS)}")
    return KINDS[config.trains](context, config)
