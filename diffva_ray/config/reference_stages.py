"""Settings of the stages that train the reference systems (``references/``)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffva_ray.config.stages import StageConfig


class ReferenceConfig(StageConfig):
    """Settings of every stage of a reference system: its training curve, and when it ends before its last step."""

    measure_every: int = Field(0, ge=0)
    """Number of steps between points of the training curve, which are logged with the losses; 0: no curve."""

    stop_when_converged: bool = False
    """End the stage when the last three points of the curve fulfil its criterion (docs/related_work.md)."""

    max_minutes: float | None = Field(None, gt=0)
    """Wall time after which the stage ends at the next point of the curve; none: no limit."""


class HealthyDenoiserConfig(StageConfig):
    """Stage of methods ``anoddpm`` and ``autoddpm``: an unconditional UNet of the latents of healthy images."""

    trains: Literal["healthy-unet"]
    """Kind of stage."""

    noise_octaves: int = Field(2, ge=0, le=5)
    """Scales of the noise beside the finest one; 0: white noise."""


class TextualInversionConfig(StageConfig):
    """Stage of method ``textual-inversion``: a word vector for each class, on a model that stays as it is."""

    trains: Literal["textual-inversion"]
    """Kind of stage."""


class GanConfig(ReferenceConfig):
    """Settings of the GAN stages, each with a generator of healthy images and a critic."""

    classes: dict[str, int] = {}
    """Abnormal class to sampling weight; empty: all abnormal classes with equal weight. Half of the images are
    healthy."""

    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of AdamW."""

    block_out_channels: tuple[int, ...] = Field((16, 32, 64), min_length=1)
    """Channels of the blocks of the generator; each block halves the side."""

    norm_num_groups: int = Field(8, ge=1)
    """Groups of the group norms; must divide every value of ``block_out_channels``."""

    critic_channels: int = Field(16, ge=4, multiple_of=4)
    """Channels of the critic's first layer."""

    critic_rate: float = Field(2.0, gt=0)
    """Learning rate of the critic, as a multiple of ``learning_rate``."""


class VaGanConfig(GanConfig):
    """Stage of method ``va-gan``: an additive map with L1 loss and a Wasserstein critic with gradient penalty."""

    trains: Literal["va-gan"]
    """Kind of stage."""

    betas: tuple[float, float] = (0.0, 0.9)
    """AdamW's decay rates of the mean gradient and of the mean squared gradient."""

    map_weight: float = Field(100.0, ge=0)
    """Weight of the L1 loss of the map, averaged over pixels in [-1, 1]; smaller images need less."""

    penalty_weight: float = Field(10.0, ge=0)
    """Weight of the gradient penalty (Gulrajani et al. 2017)."""


class VantGanConfig(GanConfig):
    """Stage of method ``vant-gan``: additive maps in both directions with cycle consistency and Wasserstein critics."""

    trains: Literal["vant-gan"]
    """Kind of stage."""

    betas: tuple[float, float] = (0.0, 0.9)
    """AdamW's decay rates of the mean gradient and of the mean squared gradient."""

    map_weight: float = Field(10.0, ge=0)
    """Weight of the L1 loss of the map, averaged over pixels in [-1, 1]."""

    penalty_weight: float = Field(10.0, ge=0)
    """Weight of the gradient penalty (Gulrajani et al. 2017)."""

    cycle_weight: float = Field(10.0, ge=0)
    """Weight of the L1 loss between an image and its translation there and back."""


class AntGanConfig(GanConfig):
    """Stage of method ``ant-gan``: translation in both directions with cycle consistency and identity losses."""

    trains: Literal["ant-gan"]
    """Kind of stage."""

    betas: tuple[float, float] = (0.5, 0.999)
    """AdamW's decay rates of the mean gradient and of the mean squared gradient."""

    cycle_weight: float = Field(10.0, ge=0)
    """Weight of the L1 loss between an image and its translation there and back."""

    identity_weight: float = Field(5.0, ge=0)
    """Weight of the L1 loss between an image of the target class and its translation."""


class SinglaConfig(GanConfig):
    """Stage of method ``singla``: an image for every posterior of the classifier; follows ``image-classifier``."""

    trains: Literal["singla"]
    """Kind of stage."""

    betas: tuple[float, float] = (0.0, 0.9)
    """AdamW's decay rates of the mean gradient and of the mean squared gradient."""

    classifier_weight: float = Field(1.0, ge=0)
    """Weight of the cross-entropy between the classifier's posterior and the wanted one."""

    cycle_weight: float = Field(10.0, ge=0)
    """Weight of the L1 losses between an image and its reconstructions at its own posterior."""


class CharachonConfig(GanConfig):
    """Stage of method ``charachon``: a similar and an adversarial generator; follows ``image-classifier``."""

    trains: Literal["charachon"]
    """Kind of stage."""

    distance_weight: float = Field(10.0, ge=0)
    """Weight of the L1 losses between an image and what each generator makes of it, in [-1, 1]."""

    closeness_weight: float = Field(5.0, ge=0)
    """Weight of the L1 loss between the two generated images."""


class ImageClassifierConfig(StageConfig):
    """Stage of the classifier of images that ``singla``, ``charachon`` and ``steex`` explain; never the judge."""

    trains: Literal["image-classifier"]
    """Kind of stage."""
