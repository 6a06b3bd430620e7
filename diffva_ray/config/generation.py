"""Settings of single methods; ``recipe.py`` adds them to recipes as sections of ``generate``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from diffva_ray.config.stages import Section


class MaskedConfig(Section):
    """Settings of method ``masked``. Lengths are fractions of the image width; grey levels are in [0, 1]."""

    source: Literal["difference", "derived", "lungs", "place"] = "difference"
    """Source of the mask. ``difference``: the pixels that an unmasked edit changes. ``derived``: DiffEdit's mask, where
    the predicted noise differs most between the healthy and the source prompt. ``lungs``: the lung mask; images without
    one use the whole image. ``place``: the part of the lung mask that the prompt names, as in "Mass in the left upper
    zone"; the network reads the prompt without these words."""

    quantile: float = Field(0.8, gt=0, lt=1)
    """``derived``: fraction of the image that lies outside the mask."""

    keep_below: float = Field(0.02, ge=0, lt=1)
    """``difference``: changes up to this grey level keep the image; must be less than ``edit_above``."""

    edit_above: float = Field(0.06, gt=0, le=1)
    """``difference``: changes from this grey level on use the counterfactual in full."""

    dilation: float = Field(0.0, ge=0, lt=0.5)
    """Distance by which the mask is dilated, as a fraction of the width."""

    feather: float = Field(0.03, ge=0, lt=0.5)
    """Width of the soft edge of the mask, as a fraction of the width."""

    @model_validator(mode="after")
    def _ordered(self) -> MaskedConfig:
        if self.keep_below >= self.edit_above:
            raise ValueError(f"keep_below {self.keep_below:g} must be less than edit_above {self.edit_above:g}")
        return self


class ClassifierGuidedConfig(Section):
    """Settings of method ``classifier-guided``."""

    scale: float = Field(50.0, ge=0)
    """Weight of the classifier's gradient; with 0 the result is the autoencoder's reconstruction."""


class ReferencesConfig(Section):
    """Settings of the reference systems (docs/related_work.md)."""

    quantile: float = Field(0.99, gt=0, le=1)
    """``what-is-healthy``, ``diff-scm``: quantile of the absolute values at which dynamic normalisation clips."""

    severity: float = -4.0
    """``swiss-army-knife``: wanted log odds of "not healthy"."""

    editing_weight: float = Field(0.1, gt=0)
    """``time``: weight lambda of the change of the cross-attentions' weights; the larger, the smaller the change."""

    posterior: float = Field(0.0, ge=0, le=1)
    """``singla``: wanted probability of "not healthy"."""

    gradients: bool = True
    """``charachon``: weight the difference of the two images by the classifier's gradient between them."""

    proximity: float = Field(0.05, ge=0)
    """``steex``: weight of the squared distance between the latents and the image's own."""

    learning_rate: float = Field(0.05, gt=0)
    """``steex``: learning rate of the optimisation of the latents."""

    mask_quantile: float = Field(0.8, gt=0, lt=1)
    """``autoddpm``: fraction of the image that lies outside the mask."""


class ControlNetConfig(Section):
    """Settings of method ``controlnet``; names and defaults follow StableDiffusionControlNetImg2ImgPipeline."""

    conditioning_scale: float | tuple[float, ...] = 0.8
    """Weight of the condition image, or one weight for each of the model's ControlNets, as ``[0.8, 0.3]``, in the order
    in which they were trained. A ControlNet of weight 0 is left out; without any the method is plain ``sdedit``."""

    start: float = Field(0.0, ge=0, le=1)
    """Fraction of the steps after which the condition is first used."""

    end: float = Field(1.0, ge=0, le=1)
    """Fraction of the steps after which the condition is no longer used."""

    @field_validator("conditioning_scale", mode="before")
    @classmethod
    def _weights(cls, value: Any) -> Any:
        weights = value if isinstance(value, (list, tuple)) else [value]
        if not weights or not all(type(weight) in (int, float) and 0 <= weight < math.inf for weight in weights):
            raise ValueError("write one weight of 0 or more, or one for each ControlNet as [0.8, 0.3]")
        return value

    def weights(self, controls: Sequence[Sequence[str]]) -> list[float]:
        """The weight of each ControlNet; ``controls``: their conditions. Raises ValueError for a wrong number."""
        scale = self.conditioning_scale
        weights = list(scale) if isinstance(scale, tuple) else [scale] * len(controls)
        if len(weights) != len(controls):
            listed = ", ".join("+".join(conditions) for conditions in controls)
            raise ValueError(
                f"generate.controlnet.conditioning_scale: {len(weights)} weights for {len(controls)} ControlNets "
                f"({listed}); give one for all, or one for each"
            )
        return weights


class AccelerationConfig(Section):
    """Training-free shortcuts for methods with one sampling schedule (``sdedit``, ``ddim-inversion``, ``masked`` with
    ``source: difference``). Each changes pixels; docs/throughput.md lists time saved and quality lost."""

    guidance_start: float = Field(0.0, ge=0, le=1)
    """Fraction of the steps before guidance starts (Kynkäänniemi et al. 2024); earlier steps use the prompt alone."""

    guidance_end: float = Field(1.0, ge=0, le=1)
    """Fraction of the steps after which guidance ends; later steps use the prompt alone."""

    deep_features_every: int = Field(1, ge=1)
    """Interval, in steps, at which the whole UNet runs; the steps between run its outermost layers only (DeepCache).
    1 always runs the whole UNet."""

    @property
    def on(self) -> bool:
        """Whether any shortcut is used."""
        return self != AccelerationConfig()

    def guides(self, step: int, steps: int) -> bool:
        """Return whether ``step`` of ``steps`` uses guidance; the rule of diffusers' ControlNet pipelines."""
        return step / steps >= self.guidance_start and (step + 1) / steps <= self.guidance_end
