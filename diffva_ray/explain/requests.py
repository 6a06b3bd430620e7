"""Answers requests about single images in micro-batches, without files: what ``distributed/serve.py`` serves."""

from __future__ import annotations

import copy
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from diffva_ray.config.methods import METHODS
from diffva_ray.config.recipe import GenerateConfig
from diffva_ray.data.encoding import encode_grey, encode_map, quantise
from diffva_ray.data.images import decode_mask, decode_with_columns
from diffva_ray.explain.image import answer_of, open_model
from diffva_ray.generate.plan import check_settings
from diffva_ray.model.card import UnusableModel
from diffva_ray.model.packaged import model_address
from diffva_ray.model.recipe import model_recipe
from diffva_ray.progress import one_line
from diffva_ray.provenance import torch_version
from diffva_ray.schema import ENGINE, Image, Mask, record_seed

Answer = dict[str, Any]  # metrics and base64 PNGs; or ``error``, one line that says what is wrong with the request


@dataclass(frozen=True)
class Prepared:
    """A request whose image is decoded."""

    config: GenerateConfig  # settings of the recipe and of the request
    square: Image  # the image as the model sees it
    mask: Mask | None  # [size, size]; only this may change
    seed: int  # of the noise
    prompt: str
    complete: bool  # whether the answer has the reconstruction, too


@dataclass(frozen=True)
class Generated:
    """What the networks made of a request; arrays are [size, size] in [0, 1]."""

    prepared: Prepared
    counterfactual: Image
    reconstruction: Image
    source_prompt: str  # what the image was taken to show
    in_float32: bool  # see CounterfactualBatch


class Responder:
    """A model that answers requests with the pixels of ``diffva generate``: ``prepare`` and ``finish`` work on one
    request and may run in threads, ``generate`` is one micro-batch.

    A request has ``name`` and ``data`` of an image file, ``prompt`` (empty: the healthy one), ``seed`` of the run,
    ``mask`` (bytes, or empty), ``settings`` (some of SamplingSettings) and, if wanted, ``reconstruction``: True. Raises
    UnusableModel."""

    def __init__(self, model: str, overrides: Sequence[str] = (), device: str | None = None) -> None:
        address = model_address(model)
        self.recipe = model_recipe(address, None, tuple(overrides))
        self.engine, self.judge = open_model(address, self.recipe, (), device)
        self.batch = self.recipe.generate.micro_batch

    @property
    def about(self) -> dict[str, Any]:
        """What decides the pixels besides a request: model, settings and environment."""
        return {
            "model_digest": self.engine.bundle.digest, "generate": self.recipe.generate.model_dump(mode="json"),
            "device": self.engine.device.type, "torch": torch_version(), "engine": ENGINE,
        }  # fmt: skip

    def __call__(self, requests: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """The answers of any number of requests, in their order."""
        ready, answers = [self.prepare(request) for request in requests], list[Answer]()
        for start in range(0, len(ready), self.batch):
            answers += map(self.finish, self.generate(ready[start : start + self.batch]))
        return answers

    def prepare(self, request: Mapping[str, Any]) -> Prepared | Answer:
        """Decode a request and check its settings."""
        config, size = self.recipe.generate, self.engine.size
        try:
            chosen = config.sampling.replace(**({"method": "masked"} if request["mask"] else {}) | request["settings"])
            chosen = chosen.replace(scheduler=METHODS[chosen.method].scheduler or chosen.scheduler)
            inside = config.masked.model_copy(update={"source": "lungs"}) if request["mask"] else config.masked
            config = config.model_copy(update={**chosen.model_dump(), "masked": inside})
            prompt = request["prompt"] or self.recipe.data.healthy_prompt
            check_settings(config, {}, prompt)
            square = decode_with_columns(request["data"], size, config.min_side, self.recipe.data.bits)[0]
            mask = decode_mask(request["mask"], size) if request["mask"] else None
        except ValueError as error:
            return {"error": one_line(error)}
        if not self.engine.fits(prompt):
            return {
                "error": f"prompt: more than the {self.engine.bundle.tokenizer.model_max_length} tokens of the model"
            }
        seed = record_seed(request["seed"], request["name"], 0)
        return Prepared(config, square, mask, seed, prompt, bool(request.get("reconstruction")))

    def generate(self, batch: Sequence[Prepared | Answer]) -> list[Generated | Answer]:
        """Run the networks on a micro-batch: once for each group of equal settings. Errors are passed on."""
        made: list[Generated | Answer] = [one if isinstance(one, dict) else {} for one in batch]
        groups: dict[str, dict[int, Prepared]] = {}
        for n, one in enumerate(batch):
            if isinstance(one, Prepared):
                groups.setdefault(one.config.model_dump_json(), {})[n] = one
        for members in groups.values():
            for n, result in zip(members, self._generate(list(members.values())), strict=True):
                made[n] = result
        return made

    def _generate(self, batch: Sequence[Prepared]) -> Sequence[Generated | Answer]:
        engine = copy.copy(self.engine)
        engine.config = batch[0].config
        images, seeds, prompts = ([getattr(one, key) for one in batch] for key in ("square", "seed", "prompt"))
        try:
            made = engine(images, seeds, prompts, lungs=[one.mask for one in batch])
        except UnusableModel as error:  # it lacks a network of the method
            return [{"error": one_line(error)}] * len(batch)
        columns = (batch, made.counterfactuals, made.reconstructions, made.source_prompts, made.in_float32)
        return [Generated(*one) for one in zip(*columns, strict=True)]

    def finish(self, made: Generated | Answer) -> Answer:
        """Measure and encode what was generated."""
        if isinstance(made, dict):
            return made
        if not (np.isfinite(made.counterfactual).all() and np.isfinite(made.reconstruction).all()):
            return {"error": "the networks gave NaN or infinity for this image"}
        if (
            self.engine.device.type == "cpu"
        ):  # this thread may be a new one; the number changes the last bits of metrics
            torch.set_num_threads(self.recipe.generate.cpu_threads)
        asked = made.prepared
        recipe = self.recipe.model_copy(update={"generate": asked.config})
        answer = answer_of(
            asked.square, asked.mask, made.counterfactual, made.reconstruction, asked.prompt, made.source_prompt,
            recipe, self.judge,
        )  # fmt: skip
        files = {"counterfactual": encode_grey(answer.counterfactual), "attribution": encode_map(answer.signed_map)}
        files |= {"reconstruction": encode_grey(quantise(made.reconstruction))} if asked.complete else {}
        return {
            **answer.numbers, "seed": asked.seed, "settings": asked.config.sampling.model_dump(),
            "model_digest": self.engine.bundle.digest, "device": self.engine.device_name,
            "in_float32": made.in_float32, **{name: b64encode(file).decode() for name, file in files.items()},
        }  # fmt: skip
