"""Settings of the stages of training; ``reference_stages.py`` has those of the reference systems."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

CONDITION = "condition."  # columns of a table that name condition images begin with it
# In ``classes`` and ``prior_class``: names that a training takes from its data set (train/classes.py).
HEALTHY, ABNORMAL, EACH = "<healthy>", "<abnormal>", "<each>"


class Section(BaseModel):
    """A section of a recipe: frozen, refuses unknown keys. The string below a field documents it in the code, in the
    JSON schema and in docs/reference/recipes.md."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True)


class StageConfig(Section):
    """Settings of every stage."""

    name: str
    """Name of the stage in logs and checkpoints; it also seeds the stage's images and noise."""

    trains: str
    """Kind of stage; each kind has further keys."""

    steps: int = Field(ge=0)
    """Number of optimizer steps."""

    batch_size: int = Field(ge=1)
    """Images per step, summed over all workers; independent of their number."""

    micro_batch_size: int | None = Field(None, ge=1)
    """Images per forward pass of one worker, with gradient accumulation; none: the worker's whole share."""

    learning_rate: float = Field(gt=0)
    """Learning rate of AdamW after the warm-up."""

    classes: dict[str, int] = {}
    """Class to sampling weight; empty: all classes with equal weight. ``<healthy>`` and ``<abnormal>`` are the healthy
    class and all other classes of the data set. ``<each>`` repeats the stage for each abnormal class; in ``name`` it
    is the name of that class."""

    warmup_steps: int = Field(0, ge=0)
    """Number of steps over which the learning rate rises linearly."""

    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or a cosine decay until the end of the stage."""

    final_lr_fraction: float = Field(0.05, ge=0, le=1)
    """Final value of the cosine decay, as a fraction of the learning rate."""

    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """AdamW, or bitsandbytes' AdamW with 8-bit states, which needs a GPU and the extra ``bnb``."""

    weight_decay: float = Field(0.01, ge=0)
    """Weight decay of AdamW."""

    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the mean gradient and of the mean squared gradient."""

    max_grad_norm: float = Field(1.0, gt=0)
    """Maximum norm of the gradients (clipping)."""

    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay of the moving average of the weights, which is then exported; none: the last weights are exported."""


class AutoencoderConfig(StageConfig):
    """Stage of the autoencoder: L1, gradient L1 and KL losses; optionally a patch adversary and feature matching."""

    trains: Literal["autoencoder"]
    """Kind of stage."""

    part: Literal["all", "decoder"] = "all"
    """Trained part. ``decoder`` keeps the latents that the UNet was trained on, for Stable Diffusion's base."""

    kl_weight: float = Field(1e-3, ge=0)
    """Weight of the KL divergence between latents and N(0, 1), averaged over the elements."""

    gradient_weight: float = Field(0.5, ge=0)
    """Weight of the L1 loss of image gradients, which keeps ribs and vessels sharp."""

    adversarial_weight: float = Field(0.0, ge=0)
    """Weight of the adversary, times the adaptive weight of Esser et al. 2021; 0: no adversary."""

    perceptual_weight: float = Field(0.0, ge=0)
    """Weight of the feature matching loss in the adversary's layers."""

    adversarial_start: int = Field(0, ge=0)
    """First step at which the adversarial loss applies to the autoencoder."""


class NoisePredictionConfig(StageConfig):
    """Settings of stages that predict noise (or velocity) from the image's caption or the prompt of its class."""

    prompt_dropout: float = Field(0.0, ge=0, lt=1)
    """Fraction of prompts replaced by the empty prompt, which trains the unconditional branch of guidance."""

    snr_gamma: float | None = Field(None, gt=0)
    """Gamma of the min-SNR weights (Hang et al. 2023); none: all noise levels have equal weight."""


class DenoiserConfig(NoisePredictionConfig):
    """Stage of UNet and text encoder: DreamBooth with prior preservation, or all classes mixed."""

    trains: Literal["denoiser"]
    """Kind of stage."""

    trainable: Literal["all", "cross-attention"] = "all"
    """Trained weights. ``cross-attention``: only the UNet weights that read the prompt, as a warm-up after the text
    encoder was replaced."""

    train_text_encoder: bool = True
    """Train the text encoder, too; ignored with ``cross-attention``."""

    prior_class: str | None = None
    """Class of DreamBooth's class set, such as ``<healthy>``, which adds an equal number of images to each step; none:
    no class set."""

    prior_loss_weight: float = Field(1.0, ge=0)
    """Weight of the loss on the class set."""

    class_images: Literal["real", "generated"] = "real"
    """Images of the class set: those of ``prior_class``, or images sampled from the model before the stage."""

    pairs: float = Field(0.0, ge=0, le=1)
    """Fraction of the images taught as edits of a given image, for method ``instruct-pix2pix``, from images with a
    ground-truth counterfactual (phantoms, implants); gives the UNet input channels for the image. 0: none."""

    num_class_images: int = Field(200, ge=1)
    """Number of sampled images in the class set."""


class ControlNetStageConfig(NoisePredictionConfig):
    """Stage of a ControlNet on the frozen model, for method ``controlnet``; follows the denoiser stages."""

    trains: Literal["controlnet"]
    """Kind of stage."""

    conditions: tuple[str, ...] = ("lungs", "edges")
    """Condition image: of ``lungs`` and Canny ``edges`` outside the lungs, computed from the image, or the user's own
    image in one column ``condition.NAME`` of a table, such as ``condition.depth``. One stage for each condition trains
    several ControlNets."""

    @field_validator("conditions")
    @classmethod
    def _known(cls, conditions: tuple[str, ...]) -> tuple[str, ...]:
        own = [name for name in conditions if name.startswith(CONDITION) and name != CONDITION]
        if not conditions or (set(conditions) - {"lungs", "edges"} and len(own) + len(conditions) != 2):
            raise ValueError("use 'lungs' or 'edges', or both, or one column 'condition.NAME' of your own images")
        return conditions


class JudgeConfig(StageConfig):
    """Stage of the judge, the classifier that measures validity; it never guides a counterfactual."""

    trains: Literal["judge"]
    """Kind of stage."""


class FactorsConfig(StageConfig):
    """Stage of the factor classifier, which says what an edit changed and what it kept: side of each class's findings,
    sex, view and age, as far as the data set knows them."""

    trains: Literal["factors"]
    """Kind of stage."""


class ClassifierConfig(StageConfig):
    """Stage of the classifier of noisy latents for method ``classifier-guided``; follows the autoencoder stage."""

    trains: Literal["classifier"]
    """Kind of stage."""

    block_out_channels: tuple[int, ...] = Field((32, 64, 64), min_length=1)
    """Channels of the blocks of the network; each block halves the side."""

    norm_num_groups: int = Field(8, ge=1)
    """Groups of the group norms; must divide every value of ``block_out_channels``."""

    noise_limit: float = Field(0.6, gt=0, le=1)
    """Highest trained noise level, as a fraction of the timesteps; at least the strength used in generation."""
