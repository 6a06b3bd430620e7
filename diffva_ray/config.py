"""Recipes: everything a run can be told, typed, frozen, from YAML, with ``--set section.key=value`` on top."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from importlib import resources
from typing import Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from diffva_ray.config_stages import Section, Stage, TrainConfig
from diffva_ray.methods import METHODS
from diffva_ray.schema import digest
from diffva_ray.storage import open_file

RECIPES = resources.files("diffva_ray") / "recipes"
Scheduler = Literal["pndm", "pndm-diffusers", "ddim", "dpmsolver++", "unipc", "euler", "vp-sde", "ve-sde"]
GUESS, SOURCE = "<guess>", "<source>"


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
    """Where the networks come from: ``base`` (a diffusers folder or hub id) and ``text_encoder`` (a short name of
    model/text.py such as radbert, a hub id, owner/name@revision, or a folder), or the architectures themselves, for a
    model from scratch (keyword arguments of the diffusers and transformers classes)."""

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


class MaskedConfig(Section):
    """Method ``masked``. Lengths are fractions of the width, grey levels are of 1."""

    source: Literal["difference", "derived", "lungs"] = "difference"  # what healing changes; DiffEdit's mask; the lungs
    quantile: float = Field(0.8, gt=0, lt=1)  # derived: share of the film left outside
    keep_below: float = Field(0.02, ge=0, lt=1)  # difference: a smaller change is none
    edit_above: float = Field(0.06, gt=0, le=1)  # difference: from here on the twin counts in full
    dilation: float = Field(0.0, ge=0, lt=0.5)
    feather: float = Field(0.03, ge=0, lt=0.5)

    @model_validator(mode="after")
    def _ordered(self) -> MaskedConfig:
        if self.keep_below >= self.edit_above:
            raise ValueError(f"keep_below {self.keep_below:g} must be less than edit_above {self.edit_above:g}")
        return self


class ClassifierGuidedConfig(Section):
    """Method ``classifier-guided``."""

    scale: float = Field(50.0, ge=0)  # of the classifier's gradient; 0: the film comes back


class ControlNetConfig(Section):
    """Method ``controlnet``; names and defaults as in StableDiffusionControlNetImg2ImgPipeline."""

    conditioning_scale: float = Field(0.8, ge=0)
    start: float = Field(0.0, ge=0, le=1)  # share of the steps before the condition counts
    end: float = Field(1.0, ge=0, le=1)


class AccelerationConfig(Section):
    """Training-free shortcuts where a sampler runs down one schedule (methods sdedit, ddim-inversion, masked by
    difference). Each changes pixels; docs/throughput.md has what they save and what they cost."""

    guidance_start: float = Field(0.0, ge=0, le=1)  # share of the steps before guidance counts (Kynkäänniemi et al.
    guidance_end: float = Field(1.0, ge=0, le=1)  # 2024), and at which it ends; outside, the prompt alone
    deep_features_every: int = Field(1, ge=1)  # whole UNet calls, the outermost layers alone between them (DeepCache)

    @property
    def on(self) -> bool:
        return self != AccelerationConfig()

    def guides(self, step: int, steps: int) -> bool:
        """Whether guidance counts in ``step`` of ``steps``; the rule of diffusers' ControlNets."""
        return step / steps >= self.guidance_start and (step + 1) / steps <= self.guidance_end


class GenerateConfig(Section):
    """What changes a pixel of a counterfactual; all of it is part of the run's fingerprint."""

    method: str = "sdedit"  # of METHODS
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
    compile: bool = False  # the networks by torch.compile: minutes at every actor's start, for runs of many films
    shard_size: int = Field(64, ge=1)
    draws: int = Field(1, ge=1)
    ssim_preset: Literal["wang", "skimage"] = "wang"
    min_side: int = Field(32, ge=1)  # smaller films are too_small
    masked: MaskedConfig = MaskedConfig()
    classifier_guided: ClassifierGuidedConfig = ClassifierGuidedConfig()
    controlnet: ControlNetConfig = ControlNetConfig()
    acceleration: AccelerationConfig = AccelerationConfig()

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
    max_quarantined_fraction: float = Field(0.01, ge=0, le=1)
    fid_subsets: int = Field(10, ge=2)
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
