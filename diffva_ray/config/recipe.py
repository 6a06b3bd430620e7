"""Recipes: typed, frozen settings of training, generation and evaluation, from YAML with ``--set`` overrides."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from importlib import resources
from typing import Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from diffva_ray.config.captions import CaptionConfig
from diffva_ray.config.generation import (
    AccelerationConfig,
    ClassifierGuidedConfig,
    ControlNetConfig,
    MaskedConfig,
    ReferencesConfig,
)
from diffva_ray.config.sampling import SamplingSettings
from diffva_ray.config.stages import CONDITION, Section
from diffva_ray.config.training import Stage, TrainConfig
from diffva_ray.progress import LOG
from diffva_ray.schema import digest
from diffva_ray.storage.opening import open_file

RECIPES = resources.files("diffva_ray") / "recipes"
RENAMED = {"small": "cpu"}  # small is the name of the packaged model
GUESS, SOURCE = "<guess>", "<source>"
ROLES = (  # of the columns of a table
    "image", "label", "patient", "mask", "lesion", "caption", "view", "laterality", "age", "sex", "spacing", "split",
)  # fmt: skip


class DataConfig(Section):
    """Names of the classes in data sets and in prompts."""

    prompts: dict[str, str] = {
        "Normal": "Normal chest scan",
        "Lung_Opacity": "Lung Opacity",
        "COVID": "COVID 19",
        "Viral Pneumonia": "Viral Pneumonia",
    }
    """Class to training prompt; a class without an entry uses its own name as prompt."""

    healthy_class: str = "Normal"
    """Name of the healthy class, also for CheXpert's "No Finding"; its images are edited only if ``--classes`` names
    it."""

    healthy_prompt: str = "normal chest scan"
    """Prompt of counterfactuals, unless ``--prompt`` is given."""

    uncertain: Literal["ignore", "positive", "negative"] = "ignore"
    """Treatment of CheXpert's uncertain labels (-1). ``positive``: counts as a finding. An image is listed under its
    positive findings only, so ``ignore`` and ``negative`` both leave the label out."""

    bits: int = Field(16, ge=8, le=16)
    """Number of bits in use in 16-bit grey PNGs and TIFFs of the data set, for example 12 for values up to 4095, common
    in DICOM exports. ``diffva inspect`` prints it."""

    columns: dict[str, str] = {}
    """Columns of a table by role, as ``image=Path,label=Finding,patient=PatientID``; further roles are ``mask``,
    ``lesion``, ``caption``, ``view``, ``laterality``, ``age``, ``sex``, ``spacing``, ``split``, and ``condition.NAME``
    for condition images. Common names are found without it."""

    root: str = ""
    """Folder (local or s3://) of the images that a table names, by relative or absolute paths; default: the folder of
    the table."""

    captions: CaptionConfig | None = None
    """Training captions made of classes, boxes, masks and tables; none: an image's own caption, else the prompt of its
    class."""

    @field_validator("columns", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        pairs = [pair.partition("=") for pair in value.split(",")] if isinstance(value, str) else []
        if any(not equals for _, equals, _ in pairs):
            raise ValueError("write it as image=NAME,label=NAME")
        columns = {role.strip(): column.strip() for role, _, column in pairs} if pairs else value
        roles = columns if isinstance(columns, dict) else ()
        if unknown := {role for role in roles if role not in ROLES and not str(role).startswith(CONDITION)}:
            raise ValueError(f"no such role: {', '.join(sorted(unknown))}; there are {', '.join(ROLES)}")
        return columns

    def prompt(self, label: str) -> str:
        """Return the training prompt of a class; by default its name with spaces for underscores."""
        return self.prompts.get(label, label.replace("_", " "))


class ModelConfig(Section):
    """Origin of the networks: ``base`` and ``text_encoder``, or, for a model from scratch, the architectures as keyword
    arguments of the diffusers and transformers classes."""

    resolution: int = Field(512, ge=16)
    """Side of the model's square images, in pixels."""

    base: str | None = None
    """Diffusers folder (local or s3://) or hub id; none: from scratch, with ``vae``, ``unet`` and ``text``."""

    text_encoder: str | None = None
    """Short name of docs/training.md such as radbert, hub id, owner/name@revision, or folder; none: the encoder of the
    base."""

    tokenizer_length: int = Field(77, ge=4)
    """Number of tokens that prompts are padded to; longer training captions are cut, longer prompts are refused."""

    attention_mask: bool = False
    """Mask padding tokens in the text encoder; Stable Diffusion does not."""

    vae: dict[str, Any] | None = None
    """Model from scratch: arguments of diffusers' ``AutoencoderKL``."""

    unet: dict[str, Any] | None = None
    """Model from scratch: arguments of diffusers' ``UNet2DConditionModel``."""

    text: dict[str, Any] | None = None
    """Model from scratch: arguments of transformers' ``BertConfig``."""

    scheduler: dict[str, Any] = {}
    """Arguments of diffusers' noise schedule, such as ``prediction_type``; they override those of the base or of Stable
    Diffusion."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.base is None) == (self.unet is None):
            raise ValueError("give either base (a diffusers folder or hub id) or vae, unet and text (from scratch)")
        return self


class GenerateConfig(SamplingSettings):
    """Generation and measurement of counterfactuals; every key is part of the run's fingerprint."""

    source_prompt: str = ""
    """Prompt that describes the input image; inversion runs under this prompt. ``<guess>``: the training prompt that
    the model predicts for the image."""

    negative_prompt: str = ""
    """Negative prompt of guidance. ``<source>``: the source prompt of the image."""

    posterior: Literal["sample", "mode"] = "mode"
    """Latents of an image: a sample of the autoencoder's posterior, as in diffusers' pipelines, or its mode."""

    difference: Literal["raw", "compensated"] = "compensated"
    """Attribution map: ``raw`` is image minus counterfactual, as in the paper; ``compensated`` is reconstruction minus
    counterfactual, which removes the autoencoder's error."""

    smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Sigma of the Gaussian that smooths the attribution map, as a fraction of the width; 0: no smoothing."""

    micro_batch: int = Field(8, ge=1)
    """Number of images per network call. It changes rounding."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Floating-point type of the networks."""

    cpu_threads: int = Field(1, ge=1)
    """PyTorch threads of an actor without a GPU. It changes rounding; more actors are faster than more threads."""

    compile: bool | None = None
    """Compile the networks of a run with ``torch.compile``, which takes minutes per machine and pays off in runs of
    thousands of images. Null: on a GPU, unless the UNet has to reuse deep features. It changes rounding."""

    shard_size: int = Field(64, ge=1)
    """Number of records per shard, the unit of commit."""

    samples: int = Field(1, ge=1)
    """Number of samples per image, each a record with its own noise."""

    ssim_preset: Literal["wang", "skimage"] = "wang"
    """Window of SSIM: ``wang`` is Gaussian, sigma 1.5, 11 pixels (Wang et al. 2004); ``skimage`` is scikit-image's
    default, uniform, 7 pixels."""

    min_side: int = Field(32, ge=1)
    """Images whose shorter side has fewer pixels are quarantined as ``too_small``."""

    masked: MaskedConfig = MaskedConfig()
    """Settings of method ``masked``."""

    classifier_guided: ClassifierGuidedConfig = ClassifierGuidedConfig()
    """Settings of method ``classifier-guided``, and of the references that follow a classifier."""

    controlnet: ControlNetConfig = ControlNetConfig()
    """Settings of method ``controlnet``."""

    references: ReferencesConfig = ReferencesConfig()
    """Settings of the reference systems."""

    acceleration: AccelerationConfig = AccelerationConfig()
    """Shortcuts that skip guidance or parts of the UNet."""

    @property
    def sampling(self) -> SamplingSettings:
        """The sampling settings alone."""
        return SamplingSettings.of(self.__dict__)

    def compiles_on(self, device: str) -> bool:
        """Whether a run on a ``device``, cuda or cpu, compiles the networks."""
        default = device == "cuda" and self.acceleration.deep_features_every == 1
        return default if self.compile is None else self.compile

    @property
    def map_name(self) -> str:
        """Kind of the stored attribution map, as in column ``attribution_kind``: difference and smoothing."""
        return self.difference + (f"-gauss{self.smoothing:g}w" if self.smoothing else "")


class EvaluateConfig(Section):
    """Evaluation of a run: limits and metrics of ``reduce``."""

    max_quarantined_fraction: float = Field(0.01, ge=0, le=1)
    """Maximum fraction of quarantined records; above it, commands end with exit code 4 and keep all work."""

    fid_subsets: int = Field(10, ge=2)
    """Number of jackknife groups for the intervals of FID and KID."""

    resize: Literal["clean", "legacy"] = "clean"
    """Resizing to Inception's 299 pixels: ``clean`` is bicubic with antialiasing (Parmar et al. 2022); ``legacy`` is
    pytorch-fid's bilinear without antialiasing."""


class Recipe(Section):
    """One YAML file with all settings of training, generation and evaluation."""

    name: str
    """Name of the recipe in logs, run.json and the model's diffva.json."""

    description: str = ""
    """One-line description for readers."""

    seed: int = 0
    """Random seed of training and of a run; all noise is derived from it."""

    data: DataConfig = DataConfig()
    """Classes and their prompts."""

    model: ModelConfig
    """Origin of the networks."""

    train: TrainConfig = TrainConfig()
    """Training of the networks."""

    generate: GenerateConfig = GenerateConfig()
    """Generation of counterfactuals."""

    evaluate: EvaluateConfig = EvaluateConfig()
    """Evaluation of a run."""

    assumed: tuple[str, ...] = ()
    """Choices of the recipe that its paper does not state."""


class RecipeError(ValueError):
    """Raised for a recipe or an override that cannot be used; the message is one line that names it."""


def recipe_names() -> list[str]:
    """Return the names of the recipes in the package, sorted."""
    return sorted(entry.name.removesuffix(".yaml") for entry in RECIPES.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_path: str, overrides: Iterable[str] = ()) -> Recipe:
    """Load a recipe and apply overrides.

    Args:
        name_or_path: Name of a shipped recipe, such as ``phantom``, or the address of a ``.yaml`` file.
        overrides: Strings ``section.key=value``, with the value in YAML, such as ``generate.strength=0.4``.

    Returns:
        The validated recipe.

    Raises:
        RecipeError: The recipe, a key or a value is invalid; the message names it in one line.
    """
    if name_or_path in RENAMED:
        LOG.info("recipe %s is called %s now", name_or_path, RENAMED[name_or_path])
        name_or_path = RENAMED[name_or_path]
    if name_or_path in recipe_names():
        text = (RECIPES / f"{name_or_path}.yaml").read_text()
    elif name_or_path.endswith((".yaml", ".yml")):
        try:
            store, file = open_file(name_or_path)
            text = store.read(file).decode()
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
    """Make a recipe from plain values and apply overrides.

    Args:
        values: The sections as parsed from YAML or from a model's ``diffva.json``; they are not changed.
        overrides: As in ``load_recipe``.

    Returns:
        The validated recipe.

    Raises:
        RecipeError: A key or a value is invalid; the message names it in one line.
    """
    if not isinstance(values, dict):
        raise RecipeError("a recipe is a mapping with the sections data, model, train, generate, evaluate")
    tree = yaml.safe_load(yaml.safe_dump(values))  # deep copy
    for override in overrides:
        _set(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(first_error(error)) from None


def first_error(error: ValidationError) -> str:
    """Describe the first error of pydantic in one line: key, reason and given value."""
    # Path of the key; below train.stages.N pydantic adds the kind of stage, which is no key of the recipe.
    first = error.errors()[0]
    place = first["loc"]
    parts = [
        part for n, part in enumerate(place) if not (n > 1 and isinstance(place[n - 1], int) and n < len(place) - 1)
    ]
    where = ".".join(str(part) for part in parts) or "recipe"
    if first["type"] == "extra_forbidden":
        keys = _sibling_keys(place)
        near = get_close_matches(str(place[-1]), keys, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(keys)}"
        return f"{where}: no such key; {hint}"
    given = first["input"]
    suffix = f" (got {given!r})" if isinstance(given, (str, int, float)) else ""
    return f"{where}: {first['msg'].removeprefix('Value error, ')}{suffix}"


def _sibling_keys(place: tuple[int | str, ...]) -> list[str]:
    """The valid keys of the section in which pydantic found an unknown key."""
    section: Any = Recipe
    for part in place[:-1]:
        if part == "stages":
            section = get_args(get_args(Stage)[0])
        elif isinstance(section, tuple):  # the index of a stage, then its kind
            section = next(
                (kind for kind in section if part in get_args(kind.model_fields["trains"].annotation)), section
            )
        else:
            annotation = section.model_fields[str(part)].annotation
            section = next((kind for kind in get_args(annotation) if kind is not type(None)), annotation)
    return list(section.model_fields)


def _set(tree: dict[str, Any], override: str) -> None:
    """Apply one ``section.key=value`` override to ``tree``. Raises RecipeError."""
    key, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"--set {override}: write it as key=value, for example --set generate.strength=0.4")
    # Walk to the parent of the key; missing sections are created.
    *parents, last = key.strip().split(".")
    node: Any = tree
    for parent in parents:
        if isinstance(node, dict):
            node = node.setdefault(parent, {})
        elif parent.isdigit() and int(parent) < len(node):
            node = node[int(parent)]
        else:
            node = None
        if not isinstance(node, (dict, list)):
            raise RecipeError(f"--set {override}: {parent!r} is not a section of the recipe")
    # Set the value; text that is not YAML is a string, as is no text: a shell removes the quotes of key="".
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        value = text
    if isinstance(node, list):
        if not (last.isdigit() and int(last) < len(node)):
            raise RecipeError(f"--set {override}: {last!r} is not an index of a list of {len(node)}")
        node[int(last)] = value
    else:
        node[last] = value


def to_yaml(recipe: Recipe) -> str:
    """Return the recipe as YAML, which ``load_recipe`` reads back."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def fingerprint(keys: dict[str, Any]) -> str:
    """Digest (16 hex digits) of everything that changes a pixel; equal fingerprints guarantee equal runs."""
    return digest(keys)[:16]


def fingerprint_difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Names of the keys in which the inputs of two fingerprints differ, sorted."""
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
