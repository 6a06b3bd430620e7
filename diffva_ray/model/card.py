"""What a model folder says about itself, readable without torch: ``diffva.json`` and the digest of its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from diffva_ray.storage.store import Store

CARD = "diffva.json"
FORMAT = 2  # of that file; 1 had a recipe of other names
TRAINING, PROGRESS = ".train/training.json", ".train/progress.json"  # of a training, while it lasts and after
COMPONENTS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
# Networks that some methods need, as folder -> "module:class" (diffusers ModelMixins; extras.py loads them). The digest
# takes them in this order: add new ones at the end.
EXTRAS: dict[str, str] = {
    "controlnet": "diffusers:ControlNetModel",
    "classifier": "diffva_ray.model.classifier:LatentClassifier",
    "vant_gan": "diffva_ray.model.gan_generator:GanGenerator",
    "ant_gan": "diffva_ray.model.gan_generator:GanGenerator",
}
LORA = "lora"  # adapters that were not merged, beside the weights they change
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class UnusableModel(ValueError):
    """A model that cannot be used; the message is one line that names it and what to do."""


def read_card(store: Store) -> dict[str, Any] | None:
    """The model's ``diffva.json``; None where there is none (a plain diffusers folder, an unfinished training)."""
    try:
        card = json.loads(store.read(CARD))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except json.JSONDecodeError as error:
        raise UnusableModel(f"{store.uri}/{CARD}: not JSON ({error})") from None
    if card.get("format") != FORMAT:
        raise UnusableModel(
            f"{store.uri}: a model of an earlier version, whose recipe has other names; train it again, or give "
            "another --model"
        )
    return card


def judge_card(store: Store) -> dict[str, Any] | None:
    """``judge/config.json``: the judge's classes, and what was measured on images held out of its training
    (``calibration``); None where the model has no judge. Raises UnusableModel for a damaged one."""
    try:
        return json.loads(store.read("judge/config.json"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise UnusableModel(f"{store.uri}/judge/config.json: not JSON ({error})") from None


def prompt_limit(store: Store, prompts: Sequence[str]) -> tuple[int, list[str]]:
    """The model's token length, and those of ``prompts`` that are longer; (0, []) where its tokenizer is in no
    ``tokenizer.json`` (CLIP's, as Stable Diffusion ships it), and only the workers can tell."""
    try:
        tokenizer = Tokenizer.from_buffer(store.read("tokenizer/tokenizer.json"))
        limit = int(json.loads(store.read("tokenizer/tokenizer_config.json"))["model_max_length"])
    except (OSError, KeyError, ValueError):
        return 0, []
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return limit, [prompt for prompt in prompts if len(tokenizer.encode(prompt).ids) > limit]


def folder_digest(folder: Path) -> str:
    """sha256 over every file of the pipeline's components (weights, configurations, vocabulary), by name and content.

    Raises UnusableModel when there are pickled weights, which run code when loaded, or no weights at all.
    """
    total = hashlib.sha256()
    weights = 0
    for component in (*COMPONENTS, *EXTRAS, LORA):
        for file in sorted((folder / component).rglob("*")):
            if not file.is_file() or file.name.startswith("."):
                continue
            if file.suffix.lower() in PICKLES:
                raise UnusableModel(
                    f"{file}: pickled weights run code when loaded and are refused; save the model as safetensors"
                )
            weights += file.suffix == ".safetensors"
            with file.open("rb") as stream:
                if file.suffix == ".safetensors" and stream.read(9)[8:] != b"{":  # where its header begins
                    raise UnusableModel(f"{file}: not safetensors, whatever its name says; save the model as such")
                stream.seek(0)
                content = (
                    hashlib.file_digest(stream, "sha256")
                    if hasattr(hashlib, "file_digest")
                    else hashlib.sha256(stream.read())
                )
            total.update(f"{file.relative_to(folder).as_posix()}\0{content.hexdigest()}\n".encode())
    if weights == 0:
        raise UnusableModel(f"{folder}: no safetensors weights in {', '.join(COMPONENTS)}; is this a diffusers folder?")
    return total.hexdigest()
