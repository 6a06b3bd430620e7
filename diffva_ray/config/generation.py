"""SamplingSettings of single methods as data. ``config.py`` puts them into recipes, as sections of ``generate``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from diffva_ray.config.stages import Section


class MaskedConfig(Section):
    """Method ``masked``. Lengths are fractions of the width, grey levels are of 1."""

    source: Literal["difference", "derived", "lungs"] = "difference"
    """Where the mask comes from. ``difference``: what generating changes. ``derived``: DiffEdit's mask, where the noise
    predicted under the healthy and under the source prompt differs most. ``lungs``: the lung mask, or the whole of a
    image that has none."""

    quantile: float = Field(0.8, gt=0, lt=1)
    """``derived``: share of the image left outside the mask."""

    keep_below: float = Field(0.02, ge=0, lt=1)
    """``difference``: a change of up to this much (grey levels of 1) counts as none; less than ``edit_above``."""

    edit_above: float = Field(0.06, gt=0, le=1)
    """``difference``: from a change of this much on (grey levels of 1) the counterfactual counts in full."""

    dilation: float = Field(0.0, ge=0, lt=0.5)
    """How far the mask grows, as a fraction of the width."""

    feather: float = Field(0.03, ge=0, lt=0.5)
    """How far the mask's edge is drawn out, as a fraction of the width."""

    @model_validator(mode="after")
    def _ordered(self) -> MaskedConfig:
        if self.keep_below >= self.edit_above:
            raise ValueError(f"keep_below {self.keep_below:g} must be less than edit_above {self.edit_above:g}")
        return self


class ClassifierGuidedConfig(Section):
    """Method ``classifier-guided``."""

    scale: float = Field(50.0, ge=0)
    """Weight of the classifier's gradient; 0: the image comes back as the autoencoder leaves it."""


class ControlNetConfig(Section):
    """Method ``controlnet``; names and defaults as in StableDiffusionControlNetImg2ImgPipeline."""

    conditioning_scale: float = Field(0.8, ge=0)
    """Weight of the condition image (lungs and edges); 0: plain ``sdedit``."""

    start: float = Field(0.0, ge=0, le=1)
    """Share of the steps after which the condition begins to count."""

    end: float = Field(1.0, ge=0, le=1)
    """Share of the steps after which the condition no longer counts."""


class AccelerationConfig(Section):
    """Training-free shortcuts where a sampler runs down one schedule (methods sdedit, ddim-inversion, masked by
    difference). Each changes pixels; docs/throughput.md has what they save and what they cost."""

    guidance_start: float = Field(0.0, ge=0, le=1)
    """Share of the steps after which guidance begins to count (Kynkäänniemi et al. 2024); before, the prompt alone."""

    guidance_end: float = Field(1.0, ge=0, le=1)
    """Share of the steps after which guidance no longer counts; from there on, the prompt alone."""

    deep_features_every: int = Field(1, ge=1)
    """Every so many steps the whole UNet runs, and between them its outermost layers alone (DeepCache); 1: always the
    whole."""

    @property
    def on(self) -> bool:
        return self != AccelerationConfig()

    def guides(self, step: int, steps: int) -> bool:
        """Whether guidance counts in ``step`` of ``steps``; the rule of diffusers' ControlNets."""
        return step / steps >= self.guidance_start and (step + 1) / steps <= self.guidance_end
