"""Stages of training as data: what they train, on which films, and how. ``config.py`` puts them into recipes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class StageConfig(Section):
    """What all stages have. ``classes`` maps class to weight (how often it is drawn)."""

    name: str
    trains: str
    steps: int = Field(ge=0)
    batch_size: int = Field(ge=1)  # of all workers together, whatever their number
    micro_batch_size: int | None = Field(None, ge=1)  # films in one forward of one worker; gradients accumulate
    learning_rate: float = Field(gt=0)
    classes: dict[str, int] = {}  # empty: all classes, equally often
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    final_lr_fraction: float = Field(0.05, ge=0, le=1)
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"  # 8-bit states by bitsandbytes, on a GPU
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = Field(1.0, gt=0)
    ema_decay: float | None = Field(None, gt=0, lt=1)


class AutoencoderConfig(StageConfig):
    """The autoencoder: L1 and gradient L1, KL, and, with an adversary, feature matching and a patch hinge loss."""

    trains: Literal["autoencoder"]
    part: Literal["all", "decoder"] = "all"  # decoder: latents stay what the UNet knows (Stable Diffusion's base)
    kl_weight: float = Field(1e-3, ge=0)
    gradient_weight: float = Field(0.5, ge=0)
    adversarial_weight: float = Field(0.0, ge=0)  # on top of the adaptive weight; 0: no adversary
    perceptual_weight: float = Field(0.0, ge=0)  # feature matching in the adversary's layers
    adversarial_start: int = Field(0, ge=0)  # step from which the autoencoder feels the adversary


class NoisePredictionConfig(StageConfig):
    """Learning to predict noise (or velocity) under the class's prompt."""

    prompt_dropout: float = Field(0.0, ge=0, lt=1)
    snr_gamma: float | None = Field(None, gt=0)


class DenoiserConfig(NoisePredictionConfig):
    """UNet and text encoder together: DreamBooth with prior preservation, or a mixed schedule."""

    trains: Literal["denoiser"]
    trainable: Literal["all", "cross-attention"] = "all"  # cross-attention: the warm-up after a swap of text encoders
    train_text_encoder: bool = True
    prior_class: str | None = None  # DreamBooth's class set
    prior_loss_weight: float = Field(1.0, ge=0)
    class_images: Literal["real", "generated"] = "real"  # the class set: films of prior_class, or drawn by the model
    num_class_images: int = Field(200, ge=1)  # where they are generated


class ControlNetStageConfig(NoisePredictionConfig):
    """A ControlNet beside the frozen model, for method ``controlnet``; comes after the denoiser's stages."""

    trains: Literal["controlnet"]
    conditions: tuple[Literal["lungs", "edges"], ...] = Field(("lungs", "edges"), min_length=1)


class JudgeConfig(StageConfig):
    """The judge of validity, which never guides a counterfactual."""

    trains: Literal["judge"]


class ClassifierConfig(StageConfig):
    """The classifier of noisy latents that guides method ``classifier-guided``; comes after the autoencoder's stage."""

    trains: Literal["classifier"]
    block_out_channels: tuple[int, ...] = Field((32, 64, 64), min_length=1)
    norm_num_groups: int = Field(8, ge=1)  # divides all of block_out_channels
    noise_limit: float = Field(0.6, gt=0, le=1)  # of the timesteps; at least the strength it is to guide at


class HealerConfig(StageConfig):
    """A generator of healthy films, and its critic. ``classes`` weigh the abnormal films; healthy ones come as often as
    all of those together."""

    weight_decay: float = Field(0.0, ge=0)
    block_out_channels: tuple[int, ...] = Field((16, 32, 64), min_length=1)
    norm_num_groups: int = Field(8, ge=1)  # divides all of block_out_channels
    critic_channels: int = Field(16, ge=4, multiple_of=4)
    critic_rate: float = Field(2.0, gt=0)  # the critic's learning rate, as a multiple of the stage's


class VantGanConfig(HealerConfig):
    """The generator of method ``vant-gan``: a map, its L1, a Wasserstein critic with a gradient penalty."""

    trains: Literal["vant-gan"]
    betas: tuple[float, float] = (0.0, 0.9)
    map_weight: float = Field(100.0, ge=0)
    penalty_weight: float = Field(10.0, ge=0)


class AntGanConfig(HealerConfig):
    """The generator of method ``ant-gan``: translation both ways, cycle consistency and identity."""

    trains: Literal["ant-gan"]
    betas: tuple[float, float] = (0.5, 0.999)
    cycle_weight: float = Field(10.0, ge=0)
    identity_weight: float = Field(5.0, ge=0)


Stage = Annotated[
    AutoencoderConfig
    | DenoiserConfig
    | ControlNetStageConfig
    | JudgeConfig
    | ClassifierConfig
    | VantGanConfig
    | AntGanConfig,
    Field(discriminator="trains"),
]


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2022) in UNet and text encoder instead of their full weights; needs peft."""

    rank: int = Field(16, ge=1)
    alpha: int | None = Field(None, ge=1)  # default: rank
    dropout: float = Field(0.0, ge=0, lt=1)
    merge: bool = True  # export ordinary weights; false: the base's weights with the adapters beside them


class ValidationConfig(Section):
    """Twins of a fixed set of films, made and scored while training runs."""

    every: int = Field(0, ge=0)  # steps of a denoiser stage between validations; 0: none
    data: str | None = None  # a data set with lesions; default: phantoms of a fixed seed
    films: int = Field(12, ge=1)


class TrainConfig(Section):
    stages: tuple[Stage, ...] = ()
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False
    sharding: Literal["none", "fsdp"] = "none"  # fsdp: no worker holds a whole network's gradients and optimizer state
    lora: LoraConfig | None = None
    checkpoint_every: int = Field(200, ge=1)
    checkpoints_to_keep: int = Field(2, ge=1)
    log_every: int = Field(20, ge=1)
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()  # beside TensorBoard, which is always written
    validation: ValidationConfig = ValidationConfig()
    cache_latents: bool = True
    cache_megabytes: int = Field(1024, ge=0)  # decoded films kept in memory, at most; and as much again of latents
