"""Teaches the denoiser to edit a given image, from pairs of an image and its ground-truth counterfactual (phantoms and
implants) and from images that should stay as they are.

The network reads the image's latents (``model/image_conditioning.py``) and a prompt that says what is wanted: the
healthy prompt asks for the ground truth, the empty prompt for no change, an image's caption for its lesions. So one
network removes and adds lesions, and its answer to the empty prompt shows what it changes without being asked to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from diffva_ray.config.recipe import RecipeError
from diffva_ray.data.dataset import Dataset
from diffva_ray.train.latents import latents_of
from diffva_ray.train.sampling import ImageSet, RandomRows
from diffva_ray.train.stage import Inputs, StageContext

KEEP, ADD = 0.15, 0.15  # of the edits: shares that ask for no change, and for the lesion; the others remove it
EMPHASIS = 9.0  # weight of an edit's error where image and ground truth differ, beside 1 everywhere
DIFFERENT = 0.02  # squared difference of scaled latents, mean over channels, at which half of it is added
NOISIEST = 0.5  # share of the edits at the highest noise level, where the network decides what to change


class Pairs:
    """The pairs of a data set. Raises RecipeError when it has no ground truth."""

    def __init__(self, context: StageContext, fraction: float) -> None:
        data = context.bundle.recipe.data
        members = context.images.images
        known = [index for index, image in enumerate(members) if image.ground_truth]
        if not known:
            raise RecipeError(
                "pairs: no image of the data has a ground-truth counterfactual; make some with diffva phantoms --onto"
            )
        truths = [replace(members[index], path=members[index].ground_truth) for index in known]
        dataset = Dataset(context.images.store, truths, "ground truth", bits=context.images.bits)
        self.truths = latents_of(context, ImageSet(dataset, context.images.size, context.cache_megabytes))
        if self.truths.images.unreadable:
            raise RecipeError(f"pairs: {next(iter(self.truths.images.unreadable))} cannot be read")
        self.position = {index: position for position, index in enumerate(known)}
        self.fraction, self.data = fraction, data
        self.labels = [image.label for image in members]
        self.vae = context.bundle.vae

    def edits(
        self,
        indices: Sequence[int],
        captions: Sequence[str],
        prompts: list[str],
        timesteps: torch.Tensor,
        random: RandomRows,
        steps: int,
    ) -> Inputs:
        """Choose the edits of a share, whose first examples are ``indices`` with ``captions``; set their prompts and
        timesteps."""
        chosen, task, level = random.uniform(3).unbind(1)
        rows = [row for row in range(len(indices)) if chosen[row] < self.fraction]
        known = [n for n, row in enumerate(rows) if indices[row] in self.position]
        shows_truth, asks_truth = torch.zeros(2, len(rows), dtype=torch.bool)
        for n, row in enumerate(rows):
            label = self.labels[indices[row]]
            healthy = label == self.data.healthy_class
            paired = healthy or indices[row] in self.position
            if task[row] < KEEP or not paired:  # no change
                prompts[row] = ""
            elif task[row] < KEEP + ADD and not healthy:  # add the lesion
                prompts[row], shows_truth[n] = captions[row], True
            else:  # remove it
                prompts[row], asks_truth[n] = self.data.prompt(self.data.healthy_class), True
            if level[row] < NOISIEST:
                timesteps[row] = steps - 1
        return {
            "rows": torch.tensor(rows, dtype=torch.long),
            "known": torch.tensor(known, dtype=torch.long),  # of the rows: those with a ground truth
            "truths": self.truths.inputs([self.position[indices[rows[n]]] for n in known]) if known else None,
            "shows_truth": shows_truth[:, None, None, None],  # for each row: the image to edit is the ground truth
            "asks_truth": asks_truth[:, None, None, None],  # the result is
        }

    def edited(
        self, edits: Inputs, means: torch.Tensor, latents: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Turn examples into edits of an image.

        Takes posterior means (not scaled) and clean latents to predict (scaled), [n, c, h, w] each. Returns the clean
        latents, the latents of the images to edit (not scaled; zeros: no image), and the weights of the errors [n, 1,
        h, w].
        """
        scale: float = self.vae.config.scaling_factor  # the autoencoder's stage sets it when it ends
        rows, image = edits["rows"], torch.zeros_like(latents)
        if not len(rows):
            return latents, image, None
        shown = truth = means[rows]
        if edits["truths"] is not None:  # an image without a ground truth is its own
            truth = shown.index_copy(0, edits["known"], self.truths.moments(edits["truths"])[0].to(shown))
        # A lesion is a small part of an image: without emphasis the network only copies, for thousands of steps.
        change = ((shown - truth) * scale).square().mean(dim=1, keepdim=True)
        extra = EMPHASIS * change / (change + DIFFERENT)
        emphasis = torch.ones_like(latents[:, :1]).index_add(0, rows, extra.to(latents))
        image = image.index_copy(0, rows, torch.where(edits["shows_truth"], truth, shown).to(latents))
        asked = torch.where(edits["asks_truth"], truth, shown) * scale
        return latents.index_copy(0, rows, asked.to(latents)), image, emphasis
