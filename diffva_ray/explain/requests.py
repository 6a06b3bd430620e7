"""Answers requests about single images in micro-batches, without files: what ``distributed/serve.py`` serves."""

from __future__ import annotations

import base64
import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from diffva_ray.config.methods import METHODS
from diffva_ray.config.recipe import GenerateConfig, make_recipe
from diffva_ray.data.encoding import encode_grey, encode_map
from diffva_ray.data.images import decode_mask, decode_with_columns
from diffva_ray.explain.image import answer_of, open_model
from diffva_ray.generate.plan import check_settings
from diffva_ray.model.card import UnusableModel, read_card
from diffva_ray.model.packaged import model_address
from diffva_ray.progress import one_line
from diffva_ray.schema import Image, Mask, record_seed
from diffva_ray.storage.opening import open_store

Prepared = tuple[Image, Mask | None, int, str]  # square, mask, seed of the noise, prompt


class Responder:
    """A model that answers batches of requests, with the pixels of ``diffva generate``.

    A request has ``name`` and ``data`` of an image file, ``prompt`` (empty: the healthy one), ``seed`` of the run,
    ``mask`` (bytes, or empty) and ``settings`` (some of SamplingSettings). Raises UnusableModel."""

    def __init__(self, model: str, overrides: Sequence[str] = (), device: str | None = None) -> None:
        address = model_address(model)
        card = read_card(open_store(address))
        if card is None:
            raise UnusableModel(f"{model}: no diffva.json there; train a model first")
        self.recipe = make_recipe(card["recipe"], overrides)
        self.engine, self.judge = open_model(address, self.recipe, (), device)
        self.batch = self.recipe.generate.micro_batch

    def __call__(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """An answer for each request: metrics, counterfactual and attribution map as base64 PNG; or one line,
        ``error``, that says what is wrong with the request."""
        answers: list[dict[str, Any]] = [{} for _ in requests]
        groups: dict[str, tuple[GenerateConfig, list[tuple[int, Prepared]]]] = {}
        for n, request in enumerate(requests):
            try:
                config, prepared = self._prepare(request)
                groups.setdefault(config.model_dump_json(), (config, []))[1].append((n, prepared))
            except ValueError as error:
                answers[n] = {"error": one_line(error)}
        for config, members in groups.values():
            for start in range(0, len(members), self.batch):
                part = members[start : start + self.batch]
                try:
                    found = self._generate(config, [prepared for _, prepared in part])
                except UnusableModel as error:  # it lacks a network of the method
                    found = [{"error": one_line(error)}] * len(part)
                for (n, _), answer in zip(part, found, strict=True):
                    answers[n] = answer
        return answers

    def _prepare(self, request: Mapping[str, Any]) -> tuple[GenerateConfig, Prepared]:
        """The settings and the decoded image of a request. Raises ValueError."""
        config, size = self.recipe.generate, self.engine.size
        settings = {"method": "masked"} if request["mask"] else {}
        settings |= request["settings"]
        chosen = config.sampling.replace(**settings)
        chosen = chosen.replace(scheduler=METHODS[chosen.method].scheduler or chosen.scheduler)
        update: dict[str, Any] = chosen.model_dump()
        if request["mask"]:
            update["masked"] = config.masked.model_copy(update={"source": "lungs"})
        config = config.model_copy(update=update)
        square = decode_with_columns(request["data"], size, config.min_side, self.recipe.data.bits)[0]
        mask = decode_mask(request["mask"], size) if request["mask"] else None
        prompt = request["prompt"] or self.recipe.data.healthy_prompt
        check_settings(config, {}, prompt)
        if not self.engine.fits(prompt):
            raise ValueError(
                f"prompt: more than the {self.engine.bundle.tokenizer.model_max_length} tokens of the model"
            )
        return config, (square, mask, record_seed(request["seed"], request["name"], 0), prompt)

    def _generate(self, config: GenerateConfig, batch: Sequence[Prepared]) -> list[dict[str, Any]]:
        """The answers of one micro-batch with equal settings."""
        squares, masks, seeds, prompts = zip(*batch, strict=True)
        engine, recipe = copy.copy(self.engine), self.recipe.model_copy(update={"generate": config})
        engine.config = config
        if engine.device.type == "cpu":
            torch.set_num_threads(config.cpu_threads)  # the caller's thread may be a new one
        made = engine(squares, seeds, prompts, lungs=masks)
        answers = list[dict[str, Any]]()
        for n in range(len(batch)):
            pair = made.counterfactuals[n], made.reconstructions[n]
            if not np.isfinite(pair).all():
                answers.append({"error": "the networks gave NaN or infinity for this image"})
                continue
            answer = answer_of(squares[n], masks[n], *pair, prompts[n], made.source_prompts[n], recipe, self.judge)
            answers.append({
                **answer.numbers, "seed": seeds[n], "settings": config.sampling.model_dump(),
                "model_digest": engine.bundle.digest,
                "counterfactual": base64.b64encode(encode_grey(answer.counterfactual)).decode(),
                "attribution": base64.b64encode(encode_map(answer.signed_map)).decode(),
            })  # fmt: skip
        return answers
