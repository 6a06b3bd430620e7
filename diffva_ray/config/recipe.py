"""Recipes: everything a run can be told, typed, frozen, from YAML, with ``--set section.key=value`` on top."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from importlib import resources
from typing import Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from diffva_ray.config.generation import AccelerationConfig, ClassifierGuidedConfig, ControlNetConfig, MaskedConfig
from diffva_ray.config.methods import METHODS
from diffva_ray.config.stages import Section, Stage, TrainConfig
from diffva_ray.schema import digest
from diffva_ray.storage.store import open_file

RECIPES = resources.files("diffva_ray") / "recipes"
Scheduler = Literal["pndm", "pndm-diffusers", "ddim", "dpmsolver++", "unipc", "euler", "vp-sde", "ve-sde"]
GUESS, SOURCE = "<guess>", "<source>"


class DataConfig(Section):
    """What the classes are called, in data sets and in prompts."""

    prompts: dict[str, str] = {
        "Normal": "Normal chest scan",
        "Lung_Opacity": "Lung Opacity",
        "COVID": "COVID 19",
        "Viral Pneumonia": "Viral Pneumonia",
    }
    """Class to the prompt its images are trained under; a class that is not named here is prompted by its own name."""

    healthy_class: str = "Normal"
    """The class that counts as healthy, and what CheXpert's "No Finding" is called; it is generated only where it is
    asked for."""

    healthy_prompt: str = "normal chest scan"
    """What a counterfactual is to show, unless ``--prompt`` says otherwise."""

    uncertain: Literal["ignore", "positive", "negative"] = "ignore"
    """CheXpert's uncertain labels (-1). ``positive``: a finding like any other. An image is listed under its positive
    findings only, so ``ignore`` and ``negative`` both leave the label out."""

    bits: int = Field(16, ge=8, le=16)
    """Bits that the values of 16-bit grey PNGs and TIFFs have, of the whole data set: 12 for values up to 4095, as many
    exports of DICOM have them. ``diffva inspect`` tells."""

    def prompt(self, label: str) -> str:
        """The training prompt of a class; a class without one is prompted by its own name."""
        return self.prompts.get(label, label.replace("_", " "))


class ModelConfig(Section):
    """Where the networks come from: ``base`` and ``text_encoder``, or the architectures themselves, for a model from
    scratch (keyword arguments of the diffusers and transformers classes)."""

    resolution: int = Field(512, ge=16)
    """Side of the square images that the model works on, in pixels."""

    base: str | None = None
    """A diffusers folder (local or s3://) or hub id; none: from scratch, with ``vae``, ``unet`` and ``text``."""

    text_encoder: str | None = None
    """A short name of docs/training.md such as radbert, a hub id, owner/name@revision, or a folder; none: the base's
    own."""

    tokenizer_length: int = Field(77, ge=4)
    """Tokens that every prompt is padded to; longer captions are cut in training, longer prompts are refused."""

    attention_mask: bool = False
    """Whether the text encoder leaves padding out of account; Stable Diffusion's does not."""

    vae: dict[str, Any] | None = None
    """From scratch: arguments of diffusers' ``AutoencoderKL``."""

    unet: dict[str, Any] | None = None
    """From scratch: arguments of diffusers' ``UNet2DConditionModel``."""

    text: dict[str, Any] | None = None
    """From scratch: arguments of transformers' ``BertConfig``."""

    scheduler: dict[str, Any] = {}
    """Arguments of diffusers' noise schedule, such as ``prediction_type``, over those of the base or of Stable
    Diffusion."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        if (self.base is None) == (self.unet is None):
            raise ValueError("give either base (a diffusers folder or hub id) or vae, unet and text (from scratch)")
        return self


class GenerateConfig(Section):
    """How counterfactuals are generated and measured; all of it is part of the run's fingerprint."""

    method: str = Field("sdedit", json_schema_extra={"enum": list(METHODS)})
    """How a counterfactual is made (docs/methods.md)."""

    scheduler: Scheduler = "pndm"
    """The sampler; methods that invert the image run with ``ddim`` only."""

    strength: float = Field(0.55, gt=0, le=1)
    """How far the image is taken apart before it is put together again, as a share of the noise schedule."""

    guidance_scale: float = Field(4.0, ge=0)
    """Classifier-free guidance towards the prompt; 1 or less is none."""

    num_inference_steps: int = Field(75, ge=1, le=1000)
    """Steps of the sampler at strength 1; ``strength`` times as many are taken."""

    source_prompt: str = ""
    """What the image is taken to show before it is generated; methods that invert it do so under this prompt.
    ``<guess>``: the model's own reading of the image."""

    negative_prompt: str = ""
    """What guidance points away from. ``<source>``: what the image is taken to show."""

    posterior: Literal["sample", "mode"] = "mode"
    """Latents of an image: drawn from the autoencoder's posterior, as diffusers' pipelines do, or its mode."""

    difference: Literal["raw", "compensated"] = "compensated"
    """What the counterfactual is subtracted from: the image itself (the paper's map), or the image as the method gives
    it back unchanged, which leaves the autoencoder's own error out of the map."""

    smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Sigma of the Gaussian that smooths the map, as a fraction of the width; 0: none."""

    micro_batch: int = Field(8, ge=1)
    """Images in one call of a network. Changes rounding."""

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the networks."""

    cpu_threads: int = Field(1, ge=1)
    """PyTorch's threads in an actor without a GPU. Changes rounding; more actors are faster than more threads."""

    compile: bool = False
    """The networks by ``torch.compile``: minutes at the start of every actor, for runs of many images."""

    shard_size: int = Field(64, ge=1)
    """Records that are made and committed together."""

    samples: int = Field(1, ge=1)
    """Records of each image, each with noise of its own."""

    ssim_preset: Literal["wang", "skimage"] = "wang"
    """SSIM's window: Gaussian of sigma 1.5 over 11 pixels (Wang et al. 2004), or scikit-image's default, 7 pixels,
    uniform."""

    min_side: int = Field(32, ge=1)
    """Images whose shorter side has fewer pixels are quarantined as ``too_small``."""

    masked: MaskedConfig = MaskedConfig()
    """SamplingSettings of method ``masked``."""

    classifier_guided: ClassifierGuidedConfig = ClassifierGuidedConfig()
    """SamplingSettings of method ``classifier-guided``."""

    controlnet: ControlNetConfig = ControlNetConfig()
    """SamplingSettings of method ``controlnet``."""

    acceleration: AccelerationConfig = AccelerationConfig()
    """Shortcuts of the samplers."""

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        if method not in METHODS:
            raise ValueError(f"no such method; there are {', '.join(METHODS)}")
        return method

    @property
    def map_name(self) -> str:
        """Name of the stored map, as in column ``map``: its difference and its smoothing."""
        return self.difference + (f"-gauss{self.smoothing:g}w" if self.smoothing else "")


class EvaluateConfig(Section):
    """How a run becomes tables."""

    max_quarantined_fraction: float = Field(0.01, ge=0, le=1)
    """Share of the planned records that may be quarantined; more is exit 4, with all work kept."""

    fid_subsets: int = Field(10, ge=2)
    """Groups of the jackknife that gives the distances between sets their intervals."""

    resize: Literal["clean", "legacy"] = "clean"
    """How images come to Inception's 299 pixels: bicubic with antialiasing (Parmar et al. 2022), or pytorch-fid's
    bilinear without."""


class Recipe(Section):
    """One YAML file: everything that a training and a run can be told."""

    name: str
    """What the recipe is called in logs, run.json and the model's diffva.json."""

    description: str = ""
    """One line for readers."""

    seed: int = 0
    """Of training, and of a run: all noise follows from it."""

    data: DataConfig = DataConfig()
    """Classes and their prompts."""

    model: ModelConfig
    """Where the networks come from."""

    train: TrainConfig = TrainConfig()
    """How they are trained."""

    generate: GenerateConfig = GenerateConfig()
    """How counterfactuals are made."""

    evaluate: EvaluateConfig = EvaluateConfig()
    """How a run becomes tables."""

    assumed: tuple[str, ...] = ()
    """What a paper leaves unsaid and the recipe had to choose."""


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
    place = first["loc"]  # below train.stages.N comes the kind of stage, which is no key of the recipe
    parts = [
        part for n, part in enumerate(place) if not (n > 1 and isinstance(place[n - 1], int) and n < len(place) - 1)
    ]
    where = ".".join(str(part) for part in parts) or "recipe"
    if first["type"] == "extra_forbidden":
        known = _keys_beside(place)
        near = get_close_matches(str(place[-1]), known, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        return f"{where}: no such key; {hint}"
    given = first["input"]
    shown = f" (got {given!r})" if isinstance(given, (str, int, float)) else ""
    return f"{where}: {first['msg'].removeprefix('Value error, ')}{shown}"


def _keys_beside(place: tuple[int | str, ...]) -> list[str]:
    """The keys of the section in which pydantic found a stranger."""
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
    key, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"--set {override}: write it as key=value, for example --set generate.strength=0.4")
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
