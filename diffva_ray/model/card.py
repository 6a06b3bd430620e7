"""Reads ``diffva.json`` (the model card), the judge's card and the digest of the weights, without torch."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from diffva_ray.progress import one_line
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import Store

CARD = "diffva.json"
FORMAT = 2  # of diffva.json; format 1 had recipes with other key names
TRAINING, PROGRESS = ".train/training.json", ".train/progress.json"  # written during training, kept afterwards
COMPONENTS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
CONTROLNETS = ("controlnet", *(f"controlnet_{n}" for n in range(1, 8)))  # as MultiControlNetModel names its folders
# Folders of the networks of single methods, which extras.py loads. The digest depends on this order: append new ones.
EXTRAS = (
    "controlnet", "classifier", "vant_gan", "ant_gan", *CONTROLNETS[1:],
    "va_gan", "healthy_unet", "textual_inversion", "image_classifier", "singla",
    "charachon",
)  # fmt: skip
LORA = "lora"  # folder of unmerged adapters
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class UnusableModel(ValueError):
    """A model that cannot be used; the message is one line that names the model and what to do."""


def read_card(store: Store) -> dict[str, Any] | None:
    """The model's ``diffva.json``; None without one (a plain diffusers folder, an unfinished training).

    Raises UnusableModel for a damaged card or one of another format.
    """
    card = _read_json(store, CARD)
    if card is not None and card.get("format") != FORMAT:
        raise UnusableModel(
            f"{store.uri}: a model of an earlier version, whose recipe has other key names; train it again or use "
            "another --model"
        )
    if card is not None and not (
        isinstance(card.get("digest"), str)
        and isinstance(recipe := card.get("recipe"), dict)
        and isinstance(recipe.get("name"), str)
    ):
        raise UnusableModel(f"{store.uri}/{CARD}: lacks its digest or its recipe; restore it, or train again")
    return card


def judge_card(store: Store) -> dict[str, Any] | None:
    """``judge/config.json``: the judge's classes and its measurements on held-out images (``calibration``).

    None when the model has no judge. Raises UnusableModel for a damaged file.
    """
    return _read_json(store, "judge/config.json")


def _read_json(store: Store, path: str) -> dict[str, Any] | None:
    """A JSON file of the model; None when there is none. Raises UnusableModel for a damaged file."""
    try:
        content = json.loads(store.read(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:
        raise UnusableModel(
            f"{store.uri}/{path}: not JSON ({one_line(error, 120)}); restore it, or train again"
        ) from None
    if not isinstance(content, dict):
        raise UnusableModel(f"{store.uri}/{path}: not a JSON object; restore it, or train again")
    return content


class ModelFolder:
    """A model folder, opened once; its small files are read when they are needed.

    Args:
        uri: The folder, local or an address such as ``s3://bucket/model``.

    Attributes:
        store: The folder's store.
        uri: Its address, as given.
    """

    def __init__(self, uri: str) -> None:
        self.uri, self.store = uri, open_store(uri)

    @cached_property
    def card(self) -> dict[str, Any] | None:
        """See ``read_card``."""
        return read_card(self.store)

    @cached_property
    def digest(self) -> str:
        """Digest of the weights: from the card, or computed without one. Raises UnusableModel."""
        return str(self.card["digest"]) if self.card else folder_digest(self.store.local_folder())

    def has(self, network: str) -> bool:
        """Whether the folder has an extra network (a name of EXTRAS)."""
        return self.store.exists(f"{network}/config.json")

    @cached_property
    def controls(self) -> list[list[str]]:
        """The conditions of each of the model's ControlNets, in the order of their folders. Raises UnusableModel."""
        names = itertools.takewhile(self.has, CONTROLNETS)
        configs = {name: _read_json(self.store, f"{name}/config.json") or {} for name in names}
        return [conditions_of(config, f"{self.uri}/{name}") for name, config in configs.items()]

    def too_long(self, prompts: Iterable[str]) -> tuple[int, list[str]]:
        """The number of tokens that the model reads, and the prompts that have more.

        (0, []) without ``tokenizer.json`` (CLIP's tokenizer in Stable Diffusion); then only the workers can check.
        """
        tokenizer = self._tokenizer
        try:
            limit = int(json.loads(self.store.read("tokenizer/tokenizer_config.json"))["model_max_length"])
        except (OSError, KeyError, TypeError, ValueError):  # loading the model then says what is wrong
            return 0, []
        if tokenizer is None:
            return 0, []
        return limit, [prompt for prompt in prompts if len(tokenizer.encode(prompt).ids) > limit]

    def prompt_notes(self, prompts: Iterable[str], trained: Iterable[str]) -> list[str]:
        """A line for each prompt that is empty or has words unknown to the model: words that the tokenizer spells
        by letters and that are in no ``trained`` prompt. Without ``tokenizer.json`` no word is checked."""
        known = {word for prompt in trained for word in _words(prompt)}
        notes = []
        for prompt in prompts:
            words = _words(prompt)
            unknown = [word for word in words if word not in known and self._spelled(word)]
            if unknown:
                listed = f"{len(unknown)} of {len(words)} words unknown to this model ({', '.join(unknown)})"
                notes.append(f"prompt {prompt!r}: {listed}")
            if not words:
                notes.append(f"prompt {prompt!r}: asks for nothing")
        return notes

    def _spelled(self, word: str) -> bool:
        """Whether the tokenizer spells the word, or a part of it, by single letters; an s at the end does not count."""
        if self._tokenizer is None:
            return False
        tokens = self._tokenizer.encode(word, add_special_tokens=False).tokens
        parts = tokens[:-1] if tokens[-1:] == ["##s"] else tokens
        return tokens == ["[UNK]"] or (len(parts) > 1 and any(len(part.removeprefix("##")) == 1 for part in parts))

    @cached_property
    def _tokenizer(self) -> Tokenizer | None:
        try:
            tokenizer = Tokenizer.from_buffer(self.store.read("tokenizer/tokenizer.json"))
        except (OSError, ValueError):
            return None
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer


def conditions_of(config: Mapping[str, Any], where: str) -> list[str]:
    """The condition images that a ControlNet reads, by its configuration. Raises UnusableModel."""
    conditions = config.get("conditions")
    if not isinstance(conditions, (list, tuple)) or not all(isinstance(name, str) for name in conditions):
        raise UnusableModel(
            f'{where}/config.json: does not say which condition image the ControlNet reads; add "conditions": '
            '["condition.NAME"] for a column of the data set, or ["lungs", "edges"]'
        )
    return list(conditions)


def _words(prompt: str) -> list[str]:
    return re.findall(r"\w+", prompt.lower())


def file_sha256(file: Path) -> str:
    """sha256 of a local file, in hex digits."""
    total = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def folder_digest(folder: Path) -> str:
    """sha256 over all files of the model's components (weights, configurations, vocabulary), by name and content.

    Raises UnusableModel for pickled weights, which can run code when loaded, and for a folder without weights.
    """
    total = hashlib.sha256()
    weights = 0
    for component in (*COMPONENTS, *EXTRAS, LORA):
        for file in sorted((folder / component).rglob("*")):
            if not file.is_file() or file.name.startswith("."):
                continue
            # refuse pickles, also those named .safetensors (whose JSON header begins at byte 8)
            if file.suffix.lower() in PICKLES:
                raise UnusableModel(
                    f"{file}: pickled weights can run code when loaded and are refused; save the model as safetensors"
                )
            weights += file.suffix == ".safetensors"
            with file.open("rb") as stream:
                if file.suffix == ".safetensors" and stream.read(9)[8:] != b"{":
                    raise UnusableModel(f"{file}: not safetensors, despite its name; save the model as safetensors")
            total.update(f"{file.relative_to(folder).as_posix()}\0{file_sha256(file)}\n".encode())
    if weights == 0:
        raise UnusableModel(f"{folder}: no safetensors weights in {', '.join(COMPONENTS)}; is this a diffusers folder?")
    return total.hexdigest()
