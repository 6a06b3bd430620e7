"""Recipes: everything a run can be told, typed, frozen, from YAML, with ``--set section.key=value`` on top."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from diffva_ray.schema import digest
from diffva_ray.storage import open_store

RECIPES = resources.files("diffva_ray") / "recipes"


Method = Literal["sdedit", "ddim-inversion", "cycle"]  # each is the module of that name in counterfactual/
Scheduler = Literal["pndm", "pndm-diffusers", "ddim", "dpmsolver++", "unipc", "euler"]


GUESS, SOURCE = "<guess>", "<source>"


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class DataConfig(Section):
    """What the classes are called in prompts."""

    prompts: dict[str, str] = {
        "Normal": "Normal chest scan",
        "Lung_Opacity": "Lung Opacity",
        "COVID": "COVID 19",
        "Viral Pneumonia": "Viral Pneumonia",
    }
    healthy_class: str = "Normal"
    healthy_prompt: str = "normal chest scan"
    uncertain: Literal["ignore", "positive", "negative"] = "ignore"  # CheXpert's -1 labels

    def prompt(self, label: str) -> str:
        """The training prompt of a class; a class without one is prompted by its own name."""
        return self.prompts.get(label, label.replace("_", " "))


class ModelConfig(Section):
    """Where the networks come from: ``base`` and ``text_encoder`` (hub ids or local snapshots), or the architectures
    themselves, for a model from scratch (keyword arguments of the diffusers and transformers classes)."""

    resolution: int = Field(512, ge=16)
    base: str | None = None
    text_encoder: str | None = None  # None: the base's own
    tokenizer_length: int = Field(77, ge=4)
    attention_mask: bool = False
    vae: dict[str, Any] | None = None
    unet: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    scheduler: dict[str, Any] = {}

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.base is None) == (self.unet is None):
            raise ValueError("give either base (a diffusers folder or hub id) or vae, unet and text (from scratch)")
        return self


class StageConfig(Section):
    """One stage of training. ``classes`` maps class to weight (how often it is drawn)."""

    name: str
    trains: Literal["autoencoder", "denoiser", "judge"]
    steps: int = Field(ge=0)
    batch_size: int = Field(ge=1)  # of all workers together
    learning_rate: float = Field(gt=0)
    classes: dict[str, int] = {}  # empty: all classes, equally often
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    final_lr_fraction: float = 0.05
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    ema_decay: float | None = None
    # autoencoder
    kl_weight: float = 1e-3
    gradient_weight: float = 0.5
    # denoiser
    train_text_encoder: bool = True
    prompt_dropout: float = Field(0.0, ge=0, lt=1)
    snr_gamma: float | None = None
    prior_class: str | None = None  # DreamBooth's class set: real images of this class
    prior_loss_weight: float = 1.0


class TrainConfig(Section):
    stages: tuple[StageConfig, ...] = ()
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    checkpoint_every: int = Field(200, ge=1)
    checkpoints_to_keep: int = Field(2, ge=1)
    cache_latents: bool = True
    cache_megabytes: int = 1024  # decoded films kept in memory, at most


class GenerateConfig(Section):
    """What changes a pixel of a counterfactual; all of it is part of the run's fingerprint."""

    method: Method = "sdedit"
    scheduler: Scheduler = "pndm"
    strength: float = Field(0.55, gt=0, le=1)
    guidance_scale: float = Field(4.0, ge=0)
    num_inference_steps: int = Field(75, ge=1, le=1000)
    source_prompt: str = ""  # ddim-inversion encodes the film under it; GUESS: the model's own reading of the film
    negative_prompt: str = ""  # the other branch of guidance; SOURCE: away from what the film shows
    posterior: Literal["sample", "mode"] = "mode"
    difference: Literal["raw", "compensated"] = "compensated"
    smoothing: float = Field(0.0, ge=0, lt=0.5)  # Gaussian sigma of the map, as a fraction of the width
    micro_batch: int = Field(8, ge=1)
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    cpu_threads: int = Field(1, ge=1)
    shard_size: int = Field(64, ge=1)
    draws: int = Field(1, ge=1)
    ssim_preset: Literal["wang", "skimage"] = "wang"
    min_side: int = Field(32, ge=1)  # smaller films are too_small

    @property
    def map_name(self) -> str:
        """Name of the stored map, as in column ``map``: its difference and its smoothing."""
        return self.difference + (f"-gauss{self.smoothing:g}w" if self.smoothing else "")


class EvaluateConfig(Section):
    max_quarantined_fraction: float = Field(0.01, ge=0, le=1)
    fid_subsets: int = 10
    resize: Literal["clean", "legacy"] = "clean"


class Recipe(Section):
    """One YAML file. ``assumed`` lists what a paper leaves unsaid and the recipe had to choose."""

    name: str
    description: str = ""
    seed: int = 0
    data: DataConfig = DataConfig()
    model: ModelConfig
    train: TrainConfig = TrainConfig()
    generate: GenerateConfig = GenerateConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    assumed: tuple[str, ...] = ()


class RecipeError(ValueError):
    """A recipe or an override that cannot be used; the message is one line that names it."""


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in RECIPES.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_path: str, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe of that name or file, with ``section.key=value`` overrides (values in YAML).

    Raises RecipeError, which names the recipe, key or value at fault.
    """
    if name_or_path in recipe_names():
        text = (RECIPES / f"{name_or_path}.yaml").read_text()
    elif name_or_path.endswith((".yaml", ".yml")):
        folder, _, file = name_or_path.rpartition("/")
        try:
            text = open_store(folder or ".").read(file).decode()
        except OSError as error:
            raise RecipeError(f"--recipe {name_or_path}: cannot be read ({error})") from None
    else:
        raise RecipeError(
            f"--recipe {name_or_path}: no such recipe; there are {', '.join(recipe_names())}, or give a .yaml file"
        )
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--recipe {name_or_path}: not YAML ({' '.join(str(error).split())})") from None
    return make_recipe(values, overrides)


def make_recipe(values: dict[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """A recipe from plain values (a parsed YAML, a model's ``diffva.json``) and overrides."""
    if not isinstance(values, dict):
        raise RecipeError("a recipe is a mapping with the sections data, model, train, generate, evaluate")
    tree = yaml.safe_load(yaml.safe_dump(values))  # a private deep copy
    for override in overrides:
        _set(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(first_error(error)) from None


def first_error(error: ValidationError) -> str:
    """The first thing pydantic objects to, in one line: where, what, and what was given."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "recipe"
    given = first["input"]
    shown = f" (got {given!r})" if isinstance(given, (str, int, float)) else ""
    return f"{where}: {first['msg'].removeprefix('Value error, ')}{shown}"


def _set(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"--set {override}: write it as key=value, for example --set generate.strength=0.4")
    *parents, last = key.strip().split(".")
    node: Any = tree
    for parent in parents:
        node = (
            node[int(parent)]
            if isinstance(node, list) and parent.isdigit() and int(parent) < len(node)
            else (node.setdefault(parent, {}) if isinstance(node, dict) else None)
        )
        if not isinstance(node, (dict, list)):
            raise RecipeError(f"--set {override}: {parent!r} is not a section of the recipe")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if isinstance(node, list):
        if not (last.isdigit() and int(last) < len(node)):
            raise RecipeError(f"--set {override}: {last!r} is not an index of a list of {len(node)}")
        node[int(last)] = value
    else:
        node[last] = value


def to_yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def fingerprint(keys: dict[str, Any]) -> str:
    """Digest of everything that changes a pixel; equal fingerprints promise equal runs."""
    return digest(keys)[:16]


def fingerprint_difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Names of the keys in which two fingerprints' inputs differ, sorted."""
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
