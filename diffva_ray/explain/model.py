"""A model for a notebook: load it, and generate for any number of images."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np

from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.data.images import to_square
from diffva_ray.explain.image import Explanation, add_factors, answer_of, described, mask_beside, origin
from diffva_ray.explain.inputs import Input, is_image, no_image, read_input
from diffva_ray.explain.results import Result, Results
from diffva_ray.metrics.factors import load_factors
from diffva_ray.metrics.validity import load_judge
from diffva_ray.model.card import UnusableModel
from diffva_ray.model.packaged import model_address
from diffva_ray.schema import record_seed
from diffva_ray.storage.opening import open_store


class Model:
    """A model that generates counterfactuals; ``load`` makes one.

    Attributes:
        uri: Address of the model folder.
        engine: The ``CounterfactualEngine``, for batches with other prompts, masks, seeds and settings.
    """

    def __init__(self, uri: str, device: str | None = None) -> None:
        self.uri, self.engine = uri, CounterfactualEngine.from_pretrained(uri, device)
        try:
            self._judge, self._factors = load_judge(open_store(uri)), load_factors(open_store(uri))
        except ValueError as error:
            raise UnusableModel(str(error)) from None

    def __repr__(self) -> str:
        recipe, size = self.engine.bundle.recipe, self.engine.size
        classes = ", ".join(recipe.data.prompts)
        return f"model {self.uri}: recipe {recipe.name}, {size} x {size} px, {self.engine.device}; classes {classes}"

    def generate(self, images: Any, prompt: str | None = None) -> Any:
        """Generate the counterfactual of one image or of any number of them.

        An image is a path (local or ``s3://``), a PIL image, a numpy array or a torch tensor: integers of any layout
        that PIL reads, or grey floats [H, W] in [0, 1]. The seed of a file follows from its name, as in
        ``diffva explain``; lung masks beside a file (``masks/``) are used as there.

        Args:
            images: An image, or an iterable of images.
            prompt: What the counterfactuals should show; by default the recipe's healthy prompt.

        Returns:
            A ``Result`` for an image, ``Results`` for an iterable.

        Raises:
            TypeError: If something is no image, or the prompt is no text.
            ValueError: If an image or the prompt cannot be used; the message names it.
        """
        config, data = self.engine.config, self.engine.bundle.recipe.data
        words = data.healthy_prompt if prompt is None else prompt
        if not isinstance(words, str):
            raise TypeError(f"prompt is one text for all images, got {type(words).__name__}; call again for others")
        single = is_image(images)
        if not single and not isinstance(images, Iterable):
            raise TypeError(no_image(images))
        numbered = enumerate([images] if single else images)
        results: list[Result] = []
        while part := list(islice(numbered, config.micro_batch)):
            batch = [read_input(image, f"image {n}", config.min_side, data.bits) for n, image in part]
            results += self._results(batch, words)
        return results[0] if single else Results(results)

    def _results(self, batch: list[Input], prompt: str) -> list[Result]:
        """The results of a micro-batch."""
        engine, recipe = self.engine, self.engine.bundle.recipe
        squares = [to_square(image.pixels, engine.size) for image in batch]
        seeds = [record_seed(recipe.seed, image.name.rpartition("/")[2], 0) for image in batch]
        masks = [mask_beside(image.name, "masks", engine.size) if image.file else None for image in batch]
        made = engine(squares, seeds, [prompt] * len(batch), lungs=masks)
        results = []
        for n, image in enumerate(batch):
            pair = made.counterfactuals[n], made.reconstructions[n]
            if not np.isfinite(pair).all():
                raise ValueError(f"{image.name}: the networks gave NaN or infinity for this image")
            answer = answer_of(squares[n], masks[n], *pair, prompt, made.source_prompts[n], recipe, self._judge)
            add_factors(answer, squares[n], self._factors, recipe.data)
            about = origin(image.name, image.data, self.uri, engine, recipe, seeds[n])
            about |= described(image.pixels, image.columns)
            results.append(Result(Explanation(squares[n], masks[n], None, [answer], about)))
        return results


def load(model: str | os.PathLike[str], device: str | None = None) -> Model:
    """Load a model for use in Python.

        >>> model = load("runs/demo/model")
        >>> result = model.generate("runs/demo/data/test/COVID/images/COVID-3.png")
        >>> result.counterfactual.shape == result.attribution.shape == result.image.shape
        True

    Args:
        model: Model folder, or an address such as ``s3://bucket/model``; ``small``: the model of the package.
        device: ``cpu`` or ``cuda``; by default the GPU where there is one.

    Returns:
        The model, ready to ``generate``.

    Raises:
        UnusableModel: If there is no model, or it cannot be loaded.
        StoreError: If the store fails.
    """
    return Model(model_address(os.fspath(model)), device)
