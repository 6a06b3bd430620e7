"""Mirror images of training images, with the words for sides exchanged: a finding that the data set shows on one side
only is then also seen on the other, in a patient whose heart is on the right."""

from __future__ import annotations

import re
from dataclasses import replace

from diffva_ray.data.dataset import Dataset
from diffva_ray.data.reports import is_file

_SIDE = re.compile(r"\b(?:(?i:left|right)\b|[LR](?=[UL]L\b))")  # RUL, LUL, RLL, LLL: lobes
_OPPOSITE = {"left": "right", "right": "left", "l": "r", "r": "l"}
TOLD = ("side", "second_side", "report")  # columns that say where a finding is


def other_side(text: str) -> str:
    """The text with left and right exchanged.

    >>> other_side("Left lower lobe opacity, no right-sided effusion; LLL")
    'Right lower lobe opacity, no left-sided effusion; RLL'
    """

    def exchanged(match: re.Match[str]) -> str:
        word, opposite = match[0], _OPPOSITE[match[0].lower()]
        return opposite.upper() if word.isupper() else opposite.capitalize() if word[0].isupper() else opposite

    return _SIDE.sub(exchanged, text)


def with_mirror_images(dataset: Dataset) -> Dataset:
    """The data set with the mirror image of each image after all others; captions and the columns TOLD name the other
    side. What an image's files show, and its outlined lesions, stay as they are in the files."""
    mirrored = [
        replace(
            image,
            mirrored=True,
            caption=other_side(image.caption),
            columns={
                name: other_side(text) if name in TOLD and not is_file(text) else text
                for name, text in image.columns.items()
            },
        )
        for image in dataset.images
    ]
    return replace(dataset, images=[*dataset.images, *mirrored])
