"""Mirror images of training images, with the words for sides exchanged: a finding that the data set shows on one side
only is then also seen on the other, in a patient whose heart is on the right."""

from __future__ import annotations

import re
from dataclasses import replace

from diffva_ray.data.dataset import Dataset

_SIDE = re.compile(r"\b(left|right|[LR][UL]L)\b", re.IGNORECASE)  # RUL, LUL, RLL, LLL: lobes
_OTHER = {"l": "r", "r": "l"}
_OPPOSITE = {"left": "right", "right": "left"}
TOLD = ("side", "second_side", "report")  # columns that say where a finding is


def other_side(text: str) -> str:
    """The text with left and right exchanged.

    >>> other_side("Left lower lobe opacity, no right-sided effusion; LLL")
    'Right lower lobe opacity, no left-sided effusion; RLL'
    """

    def exchanged(match: re.Match[str]) -> str:
        word = match[0]
        if len(word) == 3:
            return word if word != word.upper() else _OTHER[word[0].lower()].upper() + word[1:]
        opposite = _OPPOSITE[word.lower()]
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


def is_file(report: str) -> bool:
    """Whether a column ``report`` is the path of a text file."""
    return report.endswith(".txt") and " " not in report
