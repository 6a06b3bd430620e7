"""Stages of training as data: what they train, on which images, and how. ``config.py`` puts them into recipes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A part of a recipe: frozen, without unknown keys. The string below a field says what it means, to readers, to
    JSON schemas and to docs/reference/recipes.md."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)


class StageConfig(Section):
    """What all stages have."""

    name: str
    """What the stage is called in logs and checkpoints; its images and noise are drawn by it."""

    trains: str
    """The kind of stage; each has keys of its own."""

    steps: int = Field(ge=0)
    """Steps of the optimizer."""

    batch_size: int = Field(ge=1)
    """Images in a step, of all workers together, whatever their number."""

    micro_batch_size: int | None = Field(None, ge=1)
    """Images in one forward pass of one worker, whose gradients accumulate; none: the worker's whole share."""

    learning_rate: float = Field(gt=0)
    """Of AdamW, after the warm-up."""

    classes: dict[str, int] = {}
    """Class to weight: how often its images are drawn; empty: all classes, equally often."""

    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises linearly."""

    schedule: Literal["constant", "cosine"] = "constant"
    """The learning rate after the warm-up: constant, or a cosine down to the stage's end."""

    final_lr_fraction: float = Field(0.05, ge=0, le=1)
    """Where the cosine ends, as a fraction of the learning rate."""

    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """AdamW, or bitsandbytes' with 8-bit states, on a GPU (extra ``bnb``)."""

    weight_decay: float = Field(0.01, ge=0)
    """AdamW's."""

    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay of the gradient's mean and of its square."""

    max_grad_norm: float = Field(1.0, gt=0)
    """Norm that gradients are clipped to."""

    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay of the moving average of the weights, which then is what the model keeps; none: the last weights."""


class AutoencoderConfig(StageConfig):
    """The autoencoder: L1 and gradient L1, KL, and, with an adversary, feature matching and a patch hinge loss."""

    trains: Literal["autoencoder"]
    """The kind of stage."""

    part: Literal["all", "decoder"] = "all"
    """``decoder``: latents stay what the UNet knows, as with Stable Diffusion's base."""

    kl_weight: float = Field(1e-3, ge=0)
    """Weight of the KL divergence of the latents to N(0, 1), the mean over their elements."""

    gradient_weight: float = Field(0.5, ge=0)
    """Weight of the L1 of the images' gradients, which keeps ribs and vessels sharp."""

    adversarial_weight: float = Field(0.0, ge=0)
    """Weight of the adversary, on top of the adaptive one (Esser et al. 2021); 0: none."""

    perceptual_weight: float = Field(0.0, ge=0)
    """Weight of feature matching in the adversary's layers."""

    adversarial_start: int = Field(0, ge=0)
    """Step from which on the autoencoder feels the adversary."""


class NoisePredictionConfig(StageConfig):
    """Learning to predict noise (or velocity) under the image's caption or its class's prompt."""

    prompt_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of prompts that are replaced by the empty one, so that guidance has a trained unconditional branch."""

    snr_gamma: float | None = Field(None, gt=0)
    """Gamma of min-SNR weights (Hang et al. 2023); none: every noise level weighs the same."""


class DenoiserConfig(NoisePredictionConfig):
    """UNet and text encoder together: DreamBooth with prior preservation, or a mixed schedule."""

    trains: Literal["denoiser"]
    """The kind of stage."""

    trainable: Literal["all", "cross-attention"] = "all"
    """``cross-attention``: only the weights of the UNet that read the prompt, to warm up after a swap of text
    encoders."""

    train_text_encoder: bool = True
    """Whether the text encoder learns, too; with ``cross-attention`` it never does."""

    prior_class: str | None = None
    """The class of DreamBooth's class set, of which as many images join each step; none: no class set."""

    prior_loss_weight: float = Field(1.0, ge=0)
    """Weight of the class set's loss."""

    class_images: Literal["real", "generated"] = "real"
    """The class set: the images of ``prior_class``, or images that the model draws before the stage begins."""

    num_class_images: int = Field(200, ge=1)
    """Images of the class set, where they are drawn."""


class ControlNetStageConfig(NoisePredictionConfig):
    """A ControlNet beside the frozen model, for method ``controlnet``; comes after the denoiser's stages."""

    trains: Literal["controlnet"]
    """The kind of stage."""

    conditions: tuple[Literal["lungs", "edges"], ...] = Field(("lungs", "edges"), min_length=1)
    """What the condition image shows: lungs, and Canny edges outside them."""


class JudgeConfig(StageConfig):
    """The judge of validity, which never guides a counterfactual."""

    trains: Literal["judge"]
    """The kind of stage."""


class ClassifierConfig(StageConfig):
    """The classifier of noisy latents that guides method ``classifier-guided``; comes after the autoencoder's stage."""

    trains: Literal["classifier"]
    """The kind of stage."""

    block_out_channels: tuple[int, ...] = Field((32, 64, 64), min_length=1)
    """Channels of the network's blocks, each at half the side of the one before."""

    norm_num_groups: int = Field(8, ge=1)
    """Groups of the group norms; divides all of ``block_out_channels``."""

    noise_limit: float = Field(0.6, gt=0, le=1)
    """Highest noise level that it learns, as a share of the timesteps; at least the strength it is to guide at."""


class HealerConfig(StageConfig):
    """A generator of healthy images, and its critic."""

    classes: dict[str, int] = {}
    """Abnormal class to weight; empty: all of them, equally often. Healthy images come as often as all of those
    together."""

    weight_decay: float = Field(0.0, ge=0)
    """AdamW's."""

    block_out_channels: tuple[int, ...] = Field((16, 32, 64), min_length=1)
    """Channels of the generator's blocks, each at half the side of the one before."""

    norm_num_groups: int = Field(8, ge=1)
    """Groups of the group norms; divides all of ``block_out_channels``."""

    critic_channels: int = Field(16, ge=4, multiple_of=4)
    """Channels of the critic's first layer."""

    critic_rate: float = Field(2.0, gt=0)
    """The critic's learning rate, as a multiple of the stage's."""


class VantGanConfig(HealerConfig):
    """The generator of method ``vant-gan``: a map, its L1, a Wasserstein critic with a gradient penalty."""

    trains: Literal["vant-gan"]
    """The kind of stage."""

    betas: tuple[float, float] = (0.0, 0.9)
    """AdamW's decay of the gradient's mean and of its square."""

    map_weight: float = Field(100.0, ge=0)
    """Weight of the map's L1, the mean over pixels in [-1, 1]; smaller images want less."""

    penalty_weight: float = Field(10.0, ge=0)
    """Weight of the gradient penalty (Gulrajani et al. 2017)."""


class AntGanConfig(HealerConfig):
    """The generator of method ``ant-gan``: translation both ways, cycle consistency and identity."""

    trains: Literal["ant-gan"]
    """The kind of stage."""

    betas: tuple[float, float] = (0.5, 0.999)
    """AdamW's decay of the gradient's mean and of its square."""

    cycle_weight: float = Field(10.0, ge=0)
    """Weight of the L1 between an image and what comes back after both translations."""

    identity_weight: float = Field(5.0, ge=0)
    """Weight of the L1 between an image that is already what is wanted and its translation."""


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
    """Rank of the adapters."""

    alpha: int | None = Field(None, ge=1)
    """The adapters' update is scaled by alpha / rank; none: by 1."""

    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of the adapters' inputs."""

    merge: bool = True
    """Export ordinary weights; false: the base's weights with the adapters beside them."""


class ValidationConfig(Section):
    """CounterfactualBatch of a fixed set of images, made and scored while training runs; they change nothing of the
    training."""

    every: int = Field(0, ge=0)
    """Steps of a denoiser stage between validations; 0: none."""

    data: str | None = None
    """A data set whose images have lesion masks; none: phantoms of a fixed seed."""

    images: int = Field(12, ge=1)
    """Abnormal images that are generated, at most."""


class TrainConfig(Section):
    """How the model is trained: its stages in order, and what they share."""

    stages: tuple[Stage, ...] = ()
    """What is trained, one after the other."""

    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the networks' calculations (Accelerate's); weights and optimizers stay float32."""

    gradient_checkpointing: bool = False
    """Compute activations of UNet and text encoder again on the way back, for less memory."""

    channels_last: bool = False
    """Memory layout of the networks; faster on many GPUs."""

    compile: bool = False
    """The networks by ``torch.compile``."""

    sharding: Literal["none", "fsdp"] = "none"
    """``fsdp``: no worker holds a whole network's gradients and optimizer state."""

    lora: LoraConfig | None = None
    """Train low-rank adapters instead of the weights; none: the weights."""

    checkpoint_every: int = Field(200, ge=1)
    """Steps between checkpoints; there is one at the end of every stage, too."""

    checkpoints_to_keep: int = Field(2, ge=1)
    """The newest checkpoints, of which so many are kept."""

    log_every: int = Field(20, ge=1)
    """Steps between log entries."""

    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Beside TensorBoard, which is always written."""

    validation: ValidationConfig = ValidationConfig()
    """A look at the model while it trains."""

    cache_latents: bool = True
    """Encode every image once and keep its latents' mean and deviation, where memory allows."""

    cache_megabytes: int = Field(1024, ge=0)
    """Decoded images that a worker keeps in memory, in MB, at most; and as much again of latents."""
