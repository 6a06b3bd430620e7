"""Settings of training: the stages in order, and what they share; ``recipe.py`` adds them to recipes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from diffva_ray.config.reference_stages import (
    AntGanConfig,
    CharachonConfig,
    HealthyDenoiserConfig,
    ImageClassifierConfig,
    SinglaConfig,
    TextualInversionConfig,
    VaGanConfig,
    VantGanConfig,
)
from diffva_ray.config.stages import (
    AutoencoderConfig,
    ClassifierConfig,
    ControlNetStageConfig,
    DenoiserConfig,
    FactorsConfig,
    JudgeConfig,
    Section,
)

Stage = Annotated[
    AutoencoderConfig
    | DenoiserConfig
    | ControlNetStageConfig
    | JudgeConfig
    | FactorsConfig
    | ClassifierConfig
    | VaGanConfig
    | VantGanConfig
    | AntGanConfig
    | HealthyDenoiserConfig
    | TextualInversionConfig
    | ImageClassifierConfig
    | SinglaConfig
    | CharachonConfig,
    Field(discriminator="trains"),
]


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2022) of UNet and text encoder, trained instead of the full weights; needs peft."""

    rank: int = Field(16, ge=1)
    """Rank of the adapters."""

    alpha: int | None = Field(None, ge=1)
    """Alpha of the adapters, whose update is scaled by alpha / rank; none: alpha = rank."""

    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability of the adapter inputs."""

    merge: bool = True
    """Export merged weights; false: export the base weights and the adapters separately."""


class ValidationConfig(Section):
    """Counterfactuals of a fixed set of images, generated and scored during training; the training is not affected."""

    every: int = Field(0, ge=0)
    """Number of denoiser steps between validations; 0: no validation."""

    data: str | None = None
    """Data set with lesion masks; none: phantoms of a fixed seed."""

    images: int = Field(12, ge=1)
    """Maximum number of abnormal images."""


class TrainConfig(Section):
    """Training: the stages in order, and the settings that they share."""

    stages: tuple[Stage, ...] = ()
    """Stages, in the order of training."""

    mirror: bool = False
    """Also train on the mirror image of every image, with left and right exchanged in captions. A finding that is
    always on one side is then seen on the other, too, but beside a heart that is on the right (dextrocardia)."""

    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the computation (Accelerate); weights and optimizer states stay float32."""

    gradient_checkpointing: bool | Literal["auto"] = False
    """Recompute activations of UNet and text encoder in the backward pass to save memory; ``auto``: only on a GPU that
    would be too small otherwise."""

    channels_last: bool = False
    """Use the channels-last memory layout; faster on many GPUs."""

    compile: bool = False
    """Compile the networks with ``torch.compile``."""

    sharding: Literal["none", "fsdp"] = "none"
    """``fsdp`` shards gradients and optimizer states over the workers."""

    lora: LoraConfig | None = None
    """Low-rank adapters to train instead of the weights; none: train the weights."""

    checkpoint_minutes: float = Field(10.0, gt=0)
    """Minutes between checkpoints, looked at when losses are logged; every stage also ends with a checkpoint."""

    checkpoint_every: int | None = Field(None, ge=1)
    """Number of steps between further checkpoints; none: by time alone."""

    checkpoints_to_keep: int = Field(2, ge=1)
    """Number of newest checkpoints to keep."""

    log_every: int = Field(20, ge=1)
    """Number of steps between log entries."""

    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Trackers in addition to TensorBoard, which is always written."""

    validation: ValidationConfig = ValidationConfig()
    """Validation during training."""

    cache_latents: bool = True
    """Encode every image once and keep mean and deviation of its latents, if memory allows."""

    cache_megabytes: int = Field(1024, ge=0)
    """Maximum size of a worker's cache of decoded images, in MB; the cache of latents may have the same size."""
