"""Teaches the denoiser to edit a given image, from pairs of an image and its ground-truth counterfactual (phantoms and
implants) and from images that should stay as they are.

The network reads the image's latents (``model/image_conditioning.py``) and a prompt that says what is wanted: the
healthy prompt asks for the ground truth, the empty prompt for no change, the prompt of a class for its lesion. So one
network removes and adds lesions, and its answer to the empty prompt shows what it changes without being asked to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from diffva_ray.config.recipe import RecipeError
from diffva_ray.data.dataset import Dataset
from diffva_ray.train.latents import Latents
from diffva_ray.train.sampling import ImageSet
from diffva_ray.train.stage import Batch, StageContext

KEEP, ADD = 0.15, 0.15  # of the edits: shares that ask for no change, and for the lesion; the others remove it
EMPHASIS = 9.0  # weight of an edit's error where image and ground truth differ, beside 1 everywhere
DIFFERENT = 0.02  # squared difference of scaled latents, mean over channels, at which half of it is added
NOISIEST = 0.5  # share of the edits at the highest noise level, where the network decides what to change


@dataclass
class Examples:
    """The training examples of one share of a batch, n in all."""

    indices: list[int]  # of the instances in the image set; the n - len(indices) last examples are the class set's
    means: torch.Tensor  # posterior means, not scaled [n, c, h, w]
    latents: torch.Tensor  # clean latents to predict, scaled [n, c, h, w]
    prompts: list[str]
    timesteps: torch.Tensor  # [n]
    image: torch.Tensor | None = None  # latents of the image to edit, not scaled [n, c, h, w]; zeros: no image
    emphasis: torch.Tensor | None = None  # weights of the errors [n, 1, h, w]


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
        self.truths = Latents(context, ImageSet(dataset, context.images.size, context.cache_megabytes))
        if self.truths.images.unreadable:
            raise RecipeError(f"pairs: {next(iter(self.truths.images.unreadable))} cannot be read")
        self.position = {index: position for position, index in enumerate(known)}
        self.fraction, self.data = fraction, data
        self.labels = [image.label for image in members]
        self.vae = context.bundle.vae

    def edit(self, examples: Examples, whole: Batch, steps: int) -> None:
        """Turn a share of the instances into edits of an image. Random numbers are drawn for the whole batch."""
        chosen, task, level = whole.uniform(3).unbind(1)
        scale: float = self.vae.config.scaling_factor  # the autoencoder's stage sets it when it ends
        examples.image = torch.zeros_like(examples.latents)
        rows = [row for row in range(len(examples.indices)) if chosen[row] < self.fraction]
        if not rows:
            return
        shown = examples.means[rows]
        truth = self._ground_truth([examples.indices[row] for row in rows], shown)
        # A lesion is a small part of an image: without emphasis the network only copies, for thousands of steps.
        change = ((shown - truth) * scale).square().mean(dim=1, keepdim=True)
        examples.emphasis = torch.ones_like(examples.latents[:, :1])
        examples.emphasis[rows] += EMPHASIS * change / (change + DIFFERENT)
        for n, row in enumerate(rows):
            label = self.labels[examples.indices[row]]
            healthy = label == self.data.healthy_class
            paired = healthy or examples.indices[row] in self.position
            if task[row] < KEEP or not paired:  # no change
                image, target, prompt = shown[n], shown[n], ""
            elif task[row] < KEEP + ADD and not healthy:  # add the lesion
                image, target, prompt = truth[n], shown[n], self.data.prompt(label)
            else:  # remove it
                image, target, prompt = shown[n], truth[n], self.data.prompt(self.data.healthy_class)
            examples.image[row], examples.latents[row] = image, target * scale
            examples.prompts[row] = prompt
            if level[row] < NOISIEST:
                examples.timesteps[row] = steps - 1

    def _ground_truth(self, indices: Sequence[int], shown: torch.Tensor) -> torch.Tensor:
        """Latents of the ground truths [n, c, h, w]; an image without one is its own."""
        truth = shown.clone()
        known = [n for n, index in enumerate(indices) if index in self.position]
        if known:
            truth[known] = self.truths.moments([self.position[indices[n]] for n in known], shown.device)[0]
        return truth
