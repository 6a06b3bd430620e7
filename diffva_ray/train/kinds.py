"""The kinds of training stages by the name that a recipe gives in ``trains``."""

from __future__ import annotations

from diffva_ray.config.recipe import RecipeError
from diffva_ray.config.stages import Stage as AnyStageConfig
from diffva_ray.train.autoencoder import AutoencoderStage
from diffva_ray.train.classifier import ClassifierStage
from diffva_ray.train.controlnet import ControlNetStage
from diffva_ray.train.denoiser import DenoiserStage
from diffva_ray.train.gan import AntGanStage, VantGanStage
from diffva_ray.train.judge import JudgeStage
from diffva_ray.train.stage import Stage, StageContext

KINDS: dict[str, type[Stage]] = {
    "autoencoder": AutoencoderStage,
    "denoiser": DenoiserStage,
    "controlnet": ControlNetStage,
    "judge": JudgeStage,
    "classifier": ClassifierStage,
    "vant-gan": VantGanStage,
    "ant-gan": AntGanStage,
}


def make_stage(context: StageContext, config: AnyStageConfig) -> Stage:
    """Build the stage that ``config`` describes. Raises RecipeError, UnusableData."""
    if config.trains not in KINDS:
        raise RecipeError(f"train.stages: unknown kind {config.trains!r}; use one of {', '.join(KINDS)}")
    return KINDS[config.trains](context, config)
